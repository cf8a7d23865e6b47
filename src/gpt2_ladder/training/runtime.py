"""Set the precision of the process and compile networks. Only this module knows what fp32, tf32, bf16 and fp16 mean.

Changes to torch's state hold for the whole process.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.amp import GradScaler

DEFAULT = "fp32"
NO_SCALER = GradScaler(enabled=False)  # changes nothing and has no state


@dataclass(frozen=True)
class Precision:
    """One row of PRECISIONS. Parameters, gradients and the optimizer's state are always float32."""

    float32_matmul: str  # how float32 matrices are multiplied: "ieee", or "tf32" with 10-bit mantissas
    autocast: torch.dtype | None  # type of matrix products in forward and loss; None: float32
    operand: str  # "fp32", "bf16" or "fp16": the operands' type; precisions that share it need the same memory
    scaled: bool = False  # the loss is scaled up, because float16 rounds numbers below 3e-8 to zero

    @property
    def dtype(self) -> torch.dtype:
        """Type of a matrix product's operands."""
        return self.autocast or torch.float32


PRECISIONS = {
    "fp32": Precision("ieee", None, "fp32"),
    "tf32": Precision("tf32", None, "fp32"),
    "bf16": Precision("ieee", torch.bfloat16, "bf16"),
    "fp16": Precision("ieee", torch.float16, "fp16", scaled=True),
}


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
    return torch.autocast(device.type, dtype=precision.dtype, enabled=precision.autocast is not None)


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
