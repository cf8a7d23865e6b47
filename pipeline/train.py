"""Train one level of the ladder: `python -m pipeline.train bf16`."""

from gpt2_ladder.config import Recipe, UserError
from gpt2_ladder.params import Params
from gpt2_ladder.running.job import Job
from gpt2_ladder.running.run import Inputs
from gpt2_ladder.running.run import run as run_job
from gpt2_ladder.training import capabilities
from pipeline import PROBE, RESULTS, TRAINING_INPUTS, read_json, read_settings, run


def main(*names: str) -> None:
    (params, environment), name = read_settings(), " ".join(names)
    if name not in params.levels:
        known = ", ".join(params.levels)
        raise UserError(f"level '{name}' is not in params.yaml: run python -m pipeline.train LEVEL with one of {known}")
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    job = make_job(params, name)
    quality, probe = params.levels[name].group == "quality", read_json(PROBE)
    micro_batch = job.shape.batch_size if quality else probe["micro_batch"]
    reason = probe["without_effect"].get(name)
    run_job(job, params, environment, Inputs(*TRAINING_INPUTS), micro_batch, reason=reason)


def make_job(params: Params, name: str) -> Job:
    """Return the job that trains level `name`. Quality levels have small batches and always use one device."""
    level = params.levels[name]
    count = params.devices if level.group == "speed" else 1
    return Job(name, "train", level, params.shape(level.group), Recipe(), count, RESULTS / "levels" / name)


if __name__ == "__main__":
    run(main)
