"""Run a training as its stage does, into any folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gpt2_ladder.config import Params
from gpt2_ladder.model import GPT
from gpt2_ladder.running import run
from pipeline import PROBE, TRAINING_INPUTS, read_environment, read_json, trial
from pipeline import train as train_stage

INPUTS = run.Inputs(*TRAINING_INPUTS)


def train(
    params: Params,
    name: str = "trial",
    folder: Path = Path("results"),
    keep: Callable[[GPT], None] = lambda model: None,
) -> bool:
    """Train the trial, or the level `name`, and write its files to `folder`."""
    job = trial.make_job(params) if name == "trial" else train_stage.make_job(params, name)
    micro_batch = read_json(PROBE)["micro_batch"] if PROBE.exists() else job.shape.batch_size
    return run.run(replace(job, folder=folder), params, read_environment(), INPUTS, micro_batch, keep)
