"""Train a tiny network in the working directory, as the stages do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt2_ladder import params_yaml
from gpt2_ladder.files import read_json, write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.running import run
from gpt2_ladder.training import data
from helpers.common import REPOSITORY, link_encoding
from pipeline import ENVIRONMENT, PROBE, TRAINING_INPUTS, environment, read_environment, trial
from pipeline import train as train_stage

INPUTS = run.Inputs(*TRAINING_INPUTS)


def prepare(bpe_files: tuple[Path, Path]) -> Params:
    """Write what a training of the tiny model reads, its text random, into the working directory; return its settings.

    It takes 12 steps and saves a checkpoint after every second one.
    """
    write_json(ENVIRONMENT, {**environment.describe().model_dump(), "threads": 1})
    write_json(PROBE, {"micro_batch": 2, "without_effect": {}})
    for shard, seed in ((INPUTS.train, 0), (INPUTS.val, 1)):
        data.write_shard(shard, np.random.default_rng(seed).integers(0, 50257, 2000))
    link_encoding(bpe_files)
    document = params_yaml.load(REPOSITORY / "params.yaml").model_dump()
    document |= {"model": "tiny", "checkpoint_every": 2}
    document["models"]["tiny"] |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    document["machines"]["cpu"] |= {"block_size": 16, "steps": 12, "eval_tokens": 32}
    document["quality"] |= {"batch_size": 2, "block_size": 16, "eval_tokens": 32}
    document["recipe"] |= {"schedule": "cosine", "lr_warmup_steps": 3, "clip_norm": 1.0, "decay": "matrices"}
    return Params.model_validate(document)


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
