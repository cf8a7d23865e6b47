"""Set the precision of the process and compile networks. precisions.py lists the precisions.

Changes to torch's state hold for the whole process.
"""

import copyreg
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from gpt2_ladder.training.precisions import PRECISIONS

DEFAULT = "fp32"
NO_SCALER = GradScaler(enabled=False)  # changes nothing and has no state
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by Precision.operand


def memory_format(name: str) -> Any:
    """Return torch's memory format called `name`."""
    return getattr(torch, name)


# Inductor's cache hashes pickles of tensors' descriptions. For a memory format, pickle would name the first imported
# module that has imported torch, which differs between stages, so that no stage would find what another one compiled.
copyreg.pickle(torch.memory_format, lambda value: (memory_format, (str(value).removeprefix("torch."),)))


def set_precision(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Set how float32 matrices are multiplied, and return a reusable autocast context for forward and loss.

    The setting holds for the process: call this again before a step at another precision.
    """
    precision = PRECISIONS[name]
    # This call keeps torch's old and new flags consistent. The generic torch.backends.fp32_precision is silently
    # ignored once anything, torch.compile included, has set the flag of matrix products.
    torch.set_float32_matmul_precision("high" if precision.float32_matmul == "tf32" else "highest")
    if (actual := float32_matmul_precision()) != precision.float32_matmul:
        raise RuntimeError(f"float32 products run in {actual}, but precision {name} needs {precision.float32_matmul}")
    return torch.autocast(device.type, dtype=operand_type(name), enabled=precision.operand != "fp32")


def operand_type(name: str) -> torch.dtype:
    """Return the type of matrix products' operands at precision `name`."""
    return DTYPES[PRECISIONS[name].operand]


def make_scaler(name: str, device: torch.device) -> GradScaler:
    """Return a new scaler for the losses of one training at precision `name`; it does nothing if none is needed."""
    return GradScaler(device.type, enabled=PRECISIONS[name].scaled)


def float32_matmul_precision() -> str:
    """Return how torch now multiplies float32 matrices on CUDA: "ieee" or "tf32"."""
    return str(torch.backends.cuda.matmul.fp32_precision)


def compile_model(model: nn.Module, autotune: bool = False, cuda_graphs: bool = False) -> None:
    """Compile `model` at its first call, as one graph for one shape. That call raises if this is impossible.

    `autotune` times several kernels for each matrix product and takes the fastest. `cuda_graphs` records the kernels of
    forward and of backward at the second step, and later steps replay them. The model is compiled in place, because
    `torch.compile(model)` renames every parameter to `_orig_mod.*`.
    """
    options = {"max_autotune": autotune, "triton.cudagraphs": cuda_graphs} if autotune or cuda_graphs else None
    model.compile(dynamic=False, fullgraph=True, options=options)


def compile_cache() -> str:
    """Return "warm" if all graphs of this process came from Inductor's disk cache, else "cold"."""
    counters = torch._dynamo.utils.counters
    misses = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return "warm" if hits and not misses else "cold"
