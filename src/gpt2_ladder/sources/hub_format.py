"""Convert checkpoints between the Hugging Face hub's format for GPT-2 and our GPT; safetensors only, no pickle.

Hugging Face's Conv1D stores the four matrices of attention and MLP as (in, out), as OpenAI's code did; nn.Linear stores
(out, in). So both conversions transpose these four matrices. All other tensors are the same.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_ladder import files
from gpt2_ladder.config import GPTConfig, UserError
from gpt2_ladder.model import GPT, count_bytes

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PARTS = "model-*-of-*.safetensors"  # of a checkpoint in several files, as transformers names them
_SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # not float8, which needs a scale
LARGEST_MASKS = 2**32  # bytes of the masks for eager attention in all layers; GPT-2's take 12 * 2**20
_TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# What our GPT computes. A config with another value is rejected: it would load, but the results would be wrong.
_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


def load_gpt(folder: Path, attention: str = "flash", least_vocab_size: int = 1) -> GPT:
    """Load config.json and model.safetensors from `folder` as a GPT in float32 on the CPU.

    Raise UserError if a file is missing or damaged, if the two files do not match, if `from_hub` rejects a tensor, or
    if vocab_size is below `least_vocab_size`.
    """
    try:
        described = files.read_json(folder / CONFIG)
        sizes = {name: described.get(name) for name in _SIZES}
        tied = described.get("tie_word_embeddings", True)
        config = GPTConfig.model_validate({**sizes, "tie_weights": tied, "attention": attention})
        tensors = dict[str, Tensor]()
        for path in weight_files(folder):
            tensors |= load_file(path)  # memory-mapped: reads only the header
    except (OSError, ValidationError, SafetensorError) as error:
        reason = files.printable(" ".join(str(error).split()))
        fix = f"name a folder with {CONFIG} and {WEIGHTS}; pickled weights, which can run code, are not read"
        raise UserError(f"{folder}: not a readable checkpoint: {reason:.500}; {fix}") from None
    for name, known in _FIXED.items():
        if described.get(name, known[0]) not in known:
            raise UserError(f"{folder / CONFIG}: {name} is {described[name]!r:.80}; only {known[0]!r} is supported")
    stored = sum(tensor.numel() for tensor in tensors.values())
    if count_bytes(config) > 4 * stored + LARGEST_MASKS:  # before memory is allocated
        size = ", ".join(f"{name} {getattr(config, name)}" for name in _SIZES)
        fix = "a file is damaged or from another network: download all again"
        raise UserError(f"{folder / CONFIG}: {size:.200} need more memory than the {stored:,} weights; {fix}")
    if config.vocab_size < least_vocab_size:
        raise UserError(f"{folder}: vocab_size {config.vocab_size} is below GPT-2's {least_vocab_size}; name another")
    with torch.device("meta"):  # allocates no memory; the largest GPT-2 takes 6 GB
        model = GPT(config, seed=None)
    model.load_state_dict(from_hub(tensors, model), assign=True)
    if config.tie_weights:
        model.wte.weight = model.lm_head.weight  # tie again, because load_state_dict assigned two parameters
    return model


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in `folder`: model.safetensors or, without it, the PARTS of a checkpoint, in order.

    Raise UserError if the parts are not all those of one checkpoint.
    """
    parts = sorted(folder.glob(PARTS))
    if not parts or (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    names = [path.name for path in parts]
    if names != [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]:
        raise UserError(
            f"{folder}: parts of the weights are missing, or of several checkpoints: {', '.join(names):.300}"
        )
    return parts


def from_hub(tensors: dict[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """Convert `tensors` from the hub's format to a state dict of `model`.

    Names may begin with `transformer.`. Causal masks are skipped. If `model` ties `lm_head.weight` to `wte.weight`, the
    first may be missing. Raise UserError for a missing, unknown or wrong tensor, and for tied tensors that differ.
    """
    config, state = model.config, dict[str, Tensor]()
    masks = {f"h.{layer}.attn.bias" for layer in range(config.n_layer)}  # constants in older files
    for key, tensor in tensors.items():
        name = key.removeprefix("transformer.")
        if wrapper := re.search(r"(_orig_mod\.|module\.)+", key):
            raise UserError(f"checkpoint: {key!r:.80}: remove the prefix {wrapper[0]!r:.80} of torch.compile or DDP")
        if name in state:
            raise UserError(f"checkpoint: tensor {name!r:.80} occurs with and without 'transformer.'; keep one of them")
        if name not in masks or tensor.shape != (1, 1, config.n_positions, config.n_positions):
            transposed = _TRANSPOSED.fullmatch(name) and tensor.dim() == 2
            state[name] = tensor.t().contiguous() if transposed else tensor.clone()  # copy: not the file's pages
    if config.tie_weights and "wte.weight" in state:
        state.setdefault("lm_head.weight", state["wte.weight"])
    expected = model.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"the checkpoint lacks {len(missing)} tensor(s), such as {missing[0]}; download it again")
    if unknown := sorted(state.keys() - expected.keys()):
        raise UserError(f"GPT-2 has no tensor {unknown[0]!r:.80} ({len(unknown)} are unknown); use another config.json")
    for name, tensor in state.items():
        shape, needed = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != needed:
            raise UserError(f"checkpoint: {name} has shape {shape}, config.json needs {needed}")
        if tensor.dtype not in _DTYPES:
            raise UserError(f"checkpoint: {name} is {tensor.dtype}; convert it to one of {_DTYPES}")
        state[name] = tensor.float()
        if not state[name].isfinite().all():
            raise UserError(f"checkpoint: {name} contains NaN or infinity; download it again or use an earlier one")
    if config.tie_weights and not torch.equal(state["lm_head.weight"], state["wte.weight"]):
        raise UserError("checkpoint: lm_head.weight differs from wte.weight; set tie_word_embeddings: false")
    return state


def to_hub(model: GPT) -> dict[str, Tensor]:
    """Convert the weights of `model` to the hub's names and layout, on the CPU and without a tied lm_head."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_weights:
        del state["lm_head.weight"]
    return {name: t.t().contiguous() if _TRANSPOSED.fullmatch(name) else t for name, t in state.items()}


def to_transformers(model: GPT) -> Any:
    """Convert `model` to transformers' GPT2LMHeadModel, which continues its texts after <|endoftext|>."""
    from transformers import GPT2Config, GPT2LMHeadModel  # not at the top: the import takes seconds
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = GPT2Config(**describe(model), bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=to_hub(model))


def describe(model: GPT) -> dict[str, Any]:
    """Return the content of config.json for `model`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: known[0] for name, known in _FIXED.items()},
        **{name: getattr(model.config, name) for name in _SIZES},
        "tie_word_embeddings": model.config.tie_weights,
    }


def save_gpt(model: GPT, folder: Path) -> None:
    """Write `model` to `folder` as config.json and model.safetensors; `load_gpt` and transformers can read them."""
    with files.replacing(folder / WEIGHTS, folder / CONFIG) as (weights, config):
        save_file(to_hub(model), weights, metadata={"format": "pt"})
        config.write_text(json.dumps(describe(model), indent=2) + "\n")
