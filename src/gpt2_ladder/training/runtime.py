"""How the process computes: precision and compilation. The only file that acts on these words.

Everything here that changes torch's state changes it for the whole process: a training stage is one process.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn


def set_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Set how float32 matmuls are computed and return the context for forward and loss, reusable at every step.

    fp32: IEEE float32 products. tf32: 10-bit mantissas in the products, tensors stay float32. bf16: matmuls run in
    bfloat16 inside the context; parameters, gradients and optimizer state stay float32.

    The matmul precision holds for the process, so call this again before a step at another precision.
    """
    wanted = {"fp32": "highest", "tf32": "high", "bf16": "highest"}[precision]
    # This call keeps torch's old and new flags consistent. The generic torch.backends.fp32_precision is silently
    # ignored once anything, torch.compile among it, has pinned the matmul's own flag.
    torch.set_float32_matmul_precision(wanted)
    resolved = float32_matmul_precision()
    if resolved != {"highest": "ieee", "high": "tf32"}[wanted]:
        raise RuntimeError(f"float32 matmuls run in {resolved} where precision {precision} asks for {wanted}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def float32_matmul_precision() -> str:
    """Return "ieee" or "tf32": how torch now computes float32 matmuls on CUDA, read back from torch itself."""
    return str(torch.backends.cuda.matmul.fp32_precision)


def compile_model(model: nn.Module) -> None:
    """Compile `model` in place at its first call: one graph for one shape, or an error.

    In place, because `torch.compile(model)` would rename every parameter to `_orig_mod.*`.
    """
    model.compile(dynamic=False, fullgraph=True)


def compile_cache() -> str:
    """Return "warm" if every graph compiled so far in this process came from Inductor's cache on disk, else "cold"."""
    counters = torch._dynamo.utils.counters
    misses = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return "warm" if hits and not misses else "cold"
