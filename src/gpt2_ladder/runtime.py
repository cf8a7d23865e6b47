"""What the process runs on: device, precision, compilation. The only file that acts on these words.

Everything here that changes torch's state changes it for the whole process: a training stage is one process.
"""

import resource
import sys
from contextlib import AbstractContextManager

import torch
from torch import nn

from gpt2_ladder.config import Environment, Switches, UserError


def open_device(name: str, threads: int) -> torch.device:
    """Return the device called `name` ("cpu" or "cuda") and give torch `threads` CPU threads.

    Raises:
        UserError: torch cannot reach a CUDA device that results/environment.json names.
    """
    torch.set_num_threads(threads)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"nvidia-smi lists a GPU, but torch {torch.__version__} cannot use it: "
                "update the driver, or hide the GPU with CUDA_VISIBLE_DEVICES='' to train on the CPU"
            )
        torch.cuda.reset_peak_memory_stats()
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work given to it; kernels are launched asynchronously on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of torch's CUDA allocator, or on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


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


def why_skipped(switches: Switches, environment: Environment, run_slow_levels: bool) -> str | None:
    """Return why this machine cannot train at `switches`, or None where it can."""
    if switches.compile and environment.compile_problem:
        return f"torch.compile cannot work here: {environment.compile_problem}"
    slow = switches.precision == "bf16" and environment.device == "cpu" and not environment.bf16
    if slow and not run_slow_levels:
        return "this CPU has no bfloat16 instructions, it would be slower than float32; run_slow_levels: true trains it"
    return None


def what_to_know(switches: Switches, environment: Environment) -> str | None:
    """Return what a reader must know about a level trained at `switches` here, or None where there is nothing."""
    if switches.precision == "tf32" and environment.device == "cpu":
        return "TF32 is a mode of NVIDIA GPUs: on a CPU the switch has no effect"
    if switches.precision == "bf16" and not environment.bf16:
        return "no bfloat16 hardware here: bf16 is emulated and slow"
    return None
