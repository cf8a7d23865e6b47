"""The GPTs of experiments/gpts as files of users, small ones."""

from collections.abc import Callable, Mapping
from functools import cache

import torch

from experiments import gpts
from experiments.checking import CLASSES
from gpt2_ladder.checking import loading
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.config import GPTConfig

__all__ = ["CLASSES"]
IDS = {  # settings that hold ids
    "video": ("vocab_size",),
    "mingpt": ("vocab_size",),
    "hub": ("vocab_size", "bos_token_id", "eos_token_id"),
    "paper": ("vocabulary",),
}


@cache
def sources(name: str) -> dict[str, str]:
    """Return the right source of implementation `name`, and those with a fault or a variant."""
    return {"right": (gpts.FOLDER / f"{name}.py").read_text(), **gpts.planted(name)}


def replaced(name: str, changes: Mapping[str, str]) -> str:
    """Return the right source of `name` with texts replaced that must occur in it."""
    source = sources(name)["right"]
    for old, new in changes.items():
        if old not in source:
            raise ValueError(f"{old!r} is not in {name}.py")
        source = source.replace(old, new)
    return source


def options(name: str, vocab_size: int = 300) -> dict[str, int]:
    """Return the config of implementation `name` for a vocabulary that a check takes 0.3 s for."""
    return {key: vocab_size if key.startswith("voc") else 0 for key in IDS[name]}


def build(write_gpt: Callable[[str], str], name: str, config: GPTConfig, source: str = "") -> Theirs:
    """Build the network of implementation `name`, or of its changed `source`, at the sizes of `config`."""
    path = write_gpt(source or sources(name)["right"])
    settings = options(name, config.vocab_size)
    torch.manual_seed(0)
    return Theirs(loading.build(loading.load(f"{path}:{CLASSES[name]}"), config, settings)).eval()
