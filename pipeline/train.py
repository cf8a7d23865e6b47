"""Train one level of the ladder: `python -m pipeline.train bf16`."""

from gpt2_ladder import files, ledger
from gpt2_ladder.config import Recipe, UserError
from gpt2_ladder.params import Params
from gpt2_ladder.running.job import Job
from gpt2_ladder.training import capabilities
from pipeline import PROBE, RESULTS, TRAINING_INPUTS, read_settings, run


def main(*names: str) -> None:
    (params, environment), name = read_settings(), " ".join(names)
    if name not in params.levels:
        known = ", ".join(params.levels)
        raise UserError(f"level '{name}' is not in params.yaml: run python -m pipeline.train LEVEL with one of {known}")
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    job, probe = make_job(params, name), files.read_json(PROBE)
    if reason := probe["without_effect"].get(name):
        job.skip(environment, reason)
        return
    with ledger.phase("imports"):
        from gpt2_ladder.running import run as training  # not at the top: torch takes two seconds

    micro_batch = job.shape.batch_size if params.levels[name].group == "quality" else probe["micro_batch"]
    training.run(job, params, environment, training.Inputs(*TRAINING_INPUTS), micro_batch)


def make_job(params: Params, name: str) -> Job:
    """Return the job that trains level `name`. Quality levels have small batches and always use one device."""
    level = params.levels[name]
    count = params.devices if level.group == "speed" else 1
    return Job(name, "train", level, params.shape(level.group), Recipe(), count, RESULTS / "levels" / name)


if __name__ == "__main__":
    run(main)
