"""Train the trial: the switches and recipe of params.yaml, with the speed levels' shape. Save the network.

Then compare it with the level fp32: take steps of both in turn, and compare their losses. results/trial/metrics.json
has the six numbers that tell experiments apart, and facts.json everything else.
"""

import csv
import os
import shutil
from itertools import islice
from pathlib import Path

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import BASELINE, Environment, Params
from gpt2_ladder.model import GPT
from gpt2_ladder.running.run import Inputs, Job
from gpt2_ladder.running.run import run as run_job
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import data, devices
from pipeline import PROBE, RESULTS, TRAIN_SHARD, TRAINING_INPUTS, TRIAL, TRIAL_FACTS, read_environment, read_json, run

FOLDER = RESULTS / "trial"
METRICS = FOLDER / "metrics.json"


def main() -> None:
    params, environment = params_yaml.load(), read_environment()
    devices.check_machine(params.machine, params.rehearsal, environment)
    inputs, micro_batch = Inputs(*TRAINING_INPUTS), read_json(PROBE)["micro_batch"]
    if not run_job(make_job(params), params, environment, inputs, micro_batch, keep):
        shutil.rmtree(TRIAL, ignore_errors=True)
        TRIAL.mkdir(parents=True, exist_ok=True)  # DVC expects the output, but there is no network to save
    # if torchrun started the ranks, the first one measures; if this command started them, this process does
    if files.ERROR_FILE not in os.environ and os.environ.get("RANK", "0") == "0":
        conclude(params, environment)


def make_job(params: Params) -> Job:
    """Return the job that trains the trial."""
    return Job("trial", "trial", params.switches, params.shape("speed"), params.recipe, params.devices, FOLDER)


def keep(model: GPT) -> None:
    hub_format.save_gpt(model, TRIAL)


def conclude(params: Params, environment: Environment) -> None:
    """Compare the trial with BASELINE; write facts.json, and a metrics.json with the six numbers."""
    from gpt2_ladder.measuring import trials  # not at the top: scipy takes a second to import

    facts, shape, seconds = read_json(METRICS), params.shape("speed"), params.trial[params.machine].seconds
    facts |= {"changes": params.changes, "seconds": seconds}
    losses = read_losses(FOLDER), read_losses(RESULTS / "levels" / BASELINE)
    facts |= trials.compare_losses(params, facts["changes"], *losses)
    if facts["status"] == "skipped" or not seconds:
        reason = facts["reason"] or f"trial.{params.machine}.seconds is 0"
        facts |= {"measurement": None, "gain": None, "not_measured": reason}
    else:
        batches = data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size)
        some = list(islice(batches, min(shape.steps, trials.MOST_ROUNDS)))
        facts |= trials.judge(trials.measure(params, environment, facts["micro_batch"], some, seconds))
    files.write_json(TRIAL_FACTS, facts)
    gain = facts["gain"] or dict.fromkeys(("ratio", "low", "high"))
    numbers = {"gain": gain["ratio"], "low": gain["low"], "high": gain["high"], "loss_apart": facts["loss_apart"]}
    files.write_json(METRICS, {**numbers, "loss": facts["loss_last"], "val": facts["val_loss"]})


def read_losses(folder: Path) -> list[float]:
    """Return the losses in the steps.csv of a training; none if it was not trained."""
    path = folder / "steps.csv"
    return [float(row["loss"]) for row in csv.DictReader(path.read_text().splitlines())] if path.exists() else []


if __name__ == "__main__":
    run(main)
