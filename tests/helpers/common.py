"""Small configs, ids, machines and files for tests."""

from pathlib import Path

import pytest
import torch

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Environment, GPTConfig
from gpt2_ladder.measuring.gains import ESTIMATOR, Measurement, Round
from gpt2_ladder.params import Params
from helpers.climbing import REPOSITORY
from pipeline import CORPUS, ENCODER_JSON, VOCAB_BPE, tokenize_corpus, verify

__all__ = ["REPOSITORY"]


def tiny(**changes: object) -> GPTConfig:
    """Return the config of a small GPT-2 with 97 ids, with some values changed."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 97}
    return GPTConfig.model_validate({**sizes, **changes})


def random_ids(batch: int = 2, time: int = 16, vocab_size: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def environment(**changes: object) -> Environment:
    """Return the environment of an imaginary machine, with some values changed."""
    values = {"device": "cpu", "device_name": "A processor", "bf16": True, "compile_problem": None, "threads": 2}
    return Environment.model_validate({**values, "python": "3", "torch": "2", "platform": "Linux", **changes})


def params_with(**changes: object) -> Params:
    """Return this repository's settings with some top-level values changed."""
    return params_yaml.load(REPOSITORY / "params.yaml").model_copy(update=changes)


def measurement(**step_ms: list[float]) -> Measurement:
    """Return a benchmark in which each level took `step_ms`, one per round; the control defaults to the baseline."""
    levels = [name for name in step_ms if name != "control"]
    step_ms.setdefault("control", step_ms[levels[0]])
    rounds = [
        Round(
            order=list(step_ms),
            step_ms=dict(zip(step_ms, times, strict=True)),
            matmul_tflops={"fp32": 0.2, "bf16": 0.4},
        )
        for times in zip(*step_ms.values(), strict=True)
    ]
    return Measurement(
        estimator=ESTIMATOR,
        model="tiny",
        batch_size=2,
        block_size=256,
        levels=levels,
        control="control",
        environment=environment(),
        rounds=rounds,
    )


def link_encoding(bpe_files: tuple[Path, Path]) -> None:
    """Link GPT-2's encoding into the working directory, where the stages look for it."""
    VOCAB_BPE.parent.mkdir(parents=True, exist_ok=True)
    for name, path in zip((VOCAB_BPE, ENCODER_JSON), bpe_files, strict=True):
        name.symlink_to(path)


def put_corpus(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """Write `raw` into the working directory as tiny Shakespeare, and make it the pinned text."""
    CORPUS.parent.mkdir(parents=True, exist_ok=True)
    CORPUS.write_bytes(raw)
    for stage in (tokenize_corpus, verify):
        monkeypatch.setattr(stage, "CORPUS_SHA256", files.sha256(CORPUS))
