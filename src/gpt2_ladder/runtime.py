"""What the process runs on: device, precision, compilation. The only file that acts on these words.

Everything here that changes torch's state changes it for the whole process: a training stage is one process.
"""

import os
import resource
import sys
import time
from contextlib import AbstractContextManager

import torch
from torch import nn

from gpt2_ladder.config import Environment, Switches, UserError


def open_device(name: str, threads: int) -> torch.device:
    """Return the device called `name` ("cpu" or "cuda") and give torch `threads` CPU threads.

    Raises:
        UserError: torch sees a GPU where results/environment.json, which asked nvidia-smi, has none, or the reverse.
    """
    torch.set_num_threads(threads)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts; CUDA itself: the fastest first
    if (name == "cuda") != torch.cuda.is_available():
        found = f"torch {torch.__version__} sees one" if name == "cpu" else f"torch {torch.__version__} cannot use it"
        raise UserError(
            f"nvidia-smi lists {'no' if name == 'cpu' else 'a'} GPU, but {found}: "
            "mend the driver, or hide the GPU with CUDA_VISIBLE_DEVICES='' to train on the CPU"
        )
    if name == "cuda":
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


def matmul_tflops(precision: str, device: torch.device, size: int = 2048, repeats: int = 3) -> float:
    """Return the TFLOP/s that a bare (size, size) matrix product reaches now, the best of `repeats`, after one untimed.

    Args:
        precision: "fp32" or "bf16", the operands' type.
        device: where to multiply.
        size: 2048 keeps two cores busy for 0.05 to 0.1 s.
        repeats: how often; what else runs on the machine can only make one slower.
    """
    a = torch.randn(size, size, device=device).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e12


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
    if switches.precision != "bf16" or environment.bf16:
        return None
    if environment.device == "cuda":
        # without bf16 in hardware torch emulates it, but Inductor refuses to compile it
        return "torch.compile needs a GPU with bfloat16 for it: compute capability 8.0" if switches.compile else None
    if run_slow_levels:
        return None
    return "this CPU has no bfloat16 instructions, it would be slower than float32; run_slow_levels: true trains it"


def what_to_know(switches: Switches, environment: Environment) -> str | None:
    """Return what a reader must know about a level trained at `switches` here, or None where there is nothing."""
    if switches.precision == "tf32" and environment.device == "cpu":
        return "TF32 is a mode of NVIDIA GPUs: on a CPU the switch has no effect"
    if switches.precision == "tf32" and not environment.bf16:
        return "this GPU has no TF32, which came with compute capability 8.0 and bfloat16: the switch has no effect"
    if switches.precision == "bf16" and not environment.bf16:
        return "no bfloat16 hardware here: bf16 is emulated and slow"
    return None
