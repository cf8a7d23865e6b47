"""Train the trial: the switches and recipe of params.yaml. Save the network.

Then compare it with the level fp32: take steps of both in turn, and compare their losses. results/trial/metrics.json
has the six numbers that tell experiments apart, and facts.json everything else.
"""

import math
import shutil
from itertools import islice
from pathlib import Path

import pipeline
from gpt2_ladder import files
from gpt2_ladder.config import BASELINE, GPT2_VOCAB_SIZE, Environment, Level, Recipe, Size, Switches, UserError
from gpt2_ladder.measuring import planning
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.running.job import Job
from gpt2_ladder.running.run import Inputs, Start
from gpt2_ladder.running.run import run as run_job
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import capabilities, data, devices, metrics, precisions
from pipeline import check_weights, is_first, read_settings, run

FOLDER = pipeline.RESULTS / "trial"
METRICS = FOLDER / "metrics.json"


def main() -> None:
    params, environment = read_settings()
    params = params.for_trial()
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    start, micro_batch = load_start(params), find_micro_batch(params, params.switches, environment)
    if not micro_batch:
        row = f"one row of recipe.block_size tokens ({params.shape('speed').block_size})"
        raise UserError(f"trial: memory does not suffice for {row} of {params.model}; set a smaller size or block_size")
    if not run_job(make_job(params), params, environment, Inputs(*pipeline.TRAINING_INPUTS), micro_batch, keep, start):
        shutil.rmtree(pipeline.TRIAL, ignore_errors=True)
        pipeline.TRIAL.mkdir(parents=True, exist_ok=True)  # DVC expects the output, but there is no network to save
    # if torchrun started the ranks, the first one measures; if this command started them, this process does
    if is_first():
        conclude(params, environment)


def make_job(params: Params) -> Job:
    """Return the job that trains the trial."""
    return Job("trial", "trial", params.switches, params.shape("speed"), params.recipe, params.devices, FOLDER)


def find_micro_batch(params: Params, switches: Switches, environment: Environment) -> int:
    """Return the levels' micro-batch; for a trial with its own size or shape, the largest that is predicted to fit.

    It is 0 if not even one row is predicted to fit.
    """
    own, shape = params.recipe, params.shape("speed")
    if not (own.model or own.batch_size or own.block_size):
        return int(files.read_json(pipeline.PROBE)["micro_batch"])
    network, operand = params.gpt(switches), precisions.PRECISIONS[switches.precision].operand
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    cuda, free = devices.allocates_like_cuda(device), devices.free_memory(device)
    return planning.fitting_rows(network, operand, shape.batch_size, shape.block_size, cuda, free)


def load_start(params: Params) -> Start | None:
    """Return the weights that `recipe.start` names. Raise UserError if they are random or of another size."""
    if (start := params.recipe.start) is None:
        return None
    folder = pipeline.WEIGHTS if start == "openai" else Path(start)
    if not folder.is_dir():
        raise UserError(
            f"recipe.start = {start}: there is no such folder; name one with {hub_format.CONFIG}, or openai"
        )
    if downloads.is_stand_in(folder / hub_format.WEIGHTS):
        fix = "run `dvc repro -f download` with access to the hub, or name another folder"
        raise UserError(f"recipe.start = {start}: {folder} has random stand-in weights, not OpenAI's; {fix}")
    check_weights(folder)
    model = hub_format.load_gpt(folder, "flash", GPT2_VOCAB_SIZE)
    for name in Size.model_fields:
        if (theirs := getattr(model.config, name)) != (ours := getattr(params.size, name)):
            fix = "set recipe.model to the size of these weights"
            raise UserError(f"recipe.start = {start}: {name} is {theirs}, but {params.model} has {ours}; {fix}")
    if params.tie_weights and not model.config.tie_weights:
        raise UserError(f"recipe.start = {start}: its head is a matrix of its own; set tie_weights: false")
    sha256 = downloads.read_provenance(*hub_format.weight_files(folder))["sha256"]
    return Start(model.state_dict(), str(sha256))


def keep(model: GPT) -> None:
    hub_format.save_gpt(model, pipeline.TRIAL)


def conclude(params: Params, environment: Environment) -> None:
    """Compare the trial with BASELINE; write facts.json, and a metrics.json with the six numbers."""
    from gpt2_ladder.measuring import trials  # not at the top: scipy takes a second to import

    facts, shape, seconds = files.read_json(METRICS), params.shape("speed"), params.trial[params.machine].seconds
    losses = [metrics.read_losses(folder / "steps.csv") for folder in (FOLDER, pipeline.RESULTS / "levels" / BASELINE)]
    facts |= {"changes": params.changes, "seconds": seconds, "steps": len(losses[0])}
    count = min(metrics.count_before_skip(FOLDER / "steps.csv"), *map(len, losses))
    facts |= trials.compare_losses(params, facts["changes"], *(curve[:count] for curve in losses))
    off = "" if facts["changes"] else f"nothing differs from {BASELINE}"
    off = off if seconds else f"trial.{params.machine}.seconds is 0"
    parts = make_job(params).micro_batches(facts["micro_batch"] or 1)
    levels = {BASELINE: params.levels[BASELINE], "trial": Level(group="speed", **params.switches.model_dump())}
    same = capabilities.rows_without_effect(levels, environment, parts) if params.recipe == Recipe() else {}
    reason = facts["reason"] or off or same.get("trial")
    rows = 0 if reason else find_micro_batch(params, params.levels[BASELINE], environment)
    if not rows:
        reason = reason or f"{BASELINE} does not fit into memory at the trial's size and shape"
        facts |= {"measurement": None, "gain": None, "not_measured": reason}
    else:
        batches = data.Batches(data.open_shard(pipeline.TRAIN_SHARD), shape.batch_size, shape.block_size)
        some = list(islice(batches, min(shape.steps, trials.MOST_ROUNDS)))
        rows = min(rows, facts["micro_batch"])
        own = capabilities.effective(params.switches, environment, max(parts, math.ceil(shape.batch_size / rows)))
        measured = params.model_copy(update=own.model_dump())
        facts |= trials.judge(trials.measure(measured, environment, rows, some, seconds))
    files.write_json(pipeline.TRIAL_FACTS, facts)
    gain = facts["gain"] or dict.fromkeys(("ratio", "low", "high"))
    numbers = {"gain": gain["ratio"], "low": gain["low"], "high": gain["high"], "loss_apart": facts["loss_apart"]}
    files.write_json(METRICS, {**numbers, "loss": facts["loss_last"], "val": facts["val_loss"]})


if __name__ == "__main__":
    run(main)
