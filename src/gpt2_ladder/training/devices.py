"""The device adapter: the only file of src/ that asks whether this is an NVIDIA GPU, an Apple GPU or a CPU.

`torch.accelerator` raises where there is none, and Apple's GPUs keep no peak of their memory: hence these functions.
"""

import ctypes
import os
import platform
import resource
import sys
import time

import psutil
import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity

from gpt2_ladder.config import Environment, Switches, UserError

FIX_DRIVER = "mend the driver, or hide the GPU with CUDA_VISIBLE_DEVICES='' to train on the CPU"
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "could not create a memory object", "STATUS_ALLOC_FAILED")


def open_device(name: str, threads: int, seed: int, deterministic: bool) -> torch.device:
    """Return the device called `name` ("cuda", "mps" or "cpu"), with `threads` CPU threads and all generators seeded.

    `deterministic` makes torch take algorithms that give the same bits in every run, or raise where it has none;
    docs/GPU.md says what is the same to the bit then, and what it costs.

    Raises:
        UserError: torch sees a GPU where results/environment.json has none, or the reverse.
    """
    torch.set_num_threads(threads)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts; CUDA itself: the fastest first
    if name == "cpu" and torch.cuda.is_available():
        raise UserError(f"nvidia-smi lists no GPU, but torch {torch.__version__} sees one: {FIX_DRIVER}")
    if not {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}[name]:
        raise UserError(f"this machine has a GPU, but torch {torch.__version__} cannot use it: {FIX_DRIVER}")
    torch.manual_seed(seed)
    set_deterministic(deterministic)
    # MKL chooses a function's kernel at its first call. Made by two threads at once, that call can take one with half
    # the digits (pytorch/pytorch#188792), and AdamW's first square root would be such a call.
    torch.ones(1).sqrt()
    return torch.device(name)


def check_machine(machine: str, rehearsal: bool, environment: Environment) -> None:
    """Raise UserError unless the shapes of `machine` ("cpu" or "gpu") are for the device that this machine has.

    `rehearsal` allows a GPU's shape on a CPU, and nothing else. An Apple GPU may train either shape.
    """
    if machine == "cpu" and environment.device == "cuda":
        raise UserError(
            f"machine: cpu, but this machine has a GPU ({environment.device_name}): set machine: gpu in params.yaml, "
            "or hide the GPU with CUDA_VISIBLE_DEVICES=''"
        )
    on_cpu = machine == "gpu" and environment.device == "cpu"
    if on_cpu and not rehearsal:
        raise UserError(
            f"machine: gpu, but this machine has no GPU ({environment.device_name}): set machine: cpu in params.yaml, "
            "or rehearsal: true to train a GPU's shape on this CPU"
        )
    if rehearsal and not on_cpu:
        raise UserError("rehearsal: true allows machine: gpu on a CPU only: set rehearsal: false in params.yaml")


def check_count(name: str, count: int) -> None:
    """Raise UserError unless this machine can train on `count` of the device called `name`; a CPU is shared by all."""
    if name == "cpu":
        return
    if (there := torch.cuda.device_count() if name == "cuda" else 1) < count:
        raise UserError(
            f"devices = {count}, but this machine has {there}: set devices: {there}, or start the ranks on several "
            "machines by torchrun, as the README says"
        )


def join_ranks(device: torch.device, threads: int) -> torch.device:
    """Bring together the ranks that torchrun started, by NCCL on GPUs and gloo on CPUs; return this one's device.

    Those on one machine share its `threads`.

    Raises:
        UserError: torchrun started more ranks here than there are GPUs.
    """
    local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    check_count(device.type, local_count)
    torch.set_num_threads(max(1, threads // local_count))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # gloo on GPUs too, for the words between ranks that are no tensors
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def set_deterministic(wanted: bool) -> None:
    """Switch deterministic algorithms on or off for the process, Inductor's too; on, before any work on a GPU."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch looks once, at the first product on a GPU
    torch.use_deterministic_algorithms(wanted)
    # with it, torch also fills fresh memory with NaN to show who reads it too early: that costs, and changes no result
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in its stubs


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work given to it; a GPU's kernels are launched asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB.

    Of torch's allocator on an NVIDIA GPU; of the whole process on a CPU; on an Apple GPU, which keeps no peak, what
    Metal holds now: its cache seldom shrinks.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


def reset_peak_memory(device: torch.device) -> None:
    """Give cached memory back and, on an NVIDIA GPU, count the peak anew from here."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()


def keep_freed_memory(device: torch.device) -> None:
    """Keep freed memory for the next step, on a CPU until the process ends; on a GPU torch does so by itself.

    Left alone, glibc hands large buffers back to the kernel as soon as they are freed, and every step pays for its
    pages anew: 130,000 to 330,000 page faults a step of GPT-2 124M at B=2, T=256, against none.

    Raises:
        RuntimeError: glibc refuses.
    """
    if device.type != "cpu":
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    # no large buffer in a mapping of its own, which free() would unmap; and never a shorter heap
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        raise RuntimeError("mallopt: glibc refuses to keep freed memory")


def needs_own_process(switches: Switches, environment: Environment) -> bool:
    """Tell whether training at `switches` here would change how the other levels of its process get their memory."""
    return switches.allocator == "caching" and environment.device == "cpu"


def free_memory(device: torch.device) -> int:
    """Return how many bytes of the device's memory are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def check_memory(device: torch.device, need: int, what: str) -> None:
    """Raise UserError where `what` needs more bytes than the device has free."""
    if need > (free := free_memory(device)):
        sizes = f"{need / 1e9:,.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise UserError(f"{what} needs {sizes}: free some, or set a smaller model or vocab_size in params.yaml")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether `error` means that memory ran out: only CUDA has a type for it, the CPU a plain RuntimeError."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)
    )


def attention_kernel(q: torch.Tensor) -> str | None:
    """Return which kernel `scaled_dot_product_attention` takes for q, k and v like `q`, (B, H, T, D), causal.

    Torch's own choice, in the words of torch.nn.attention.SDPBackend; None on Apple's GPUs, which offer none.

    Raises:
        UserError: it is the math kernel of an NVIDIA GPU, which writes the (B, H, T, T) matrix out as `eager` does.
    """
    if q.device.type == "mps":
        return None
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    if kernel == "MATH" and q.device.type == "cuda":
        raise UserError(
            f"attention: flash, but torch has only its math kernel for {tuple(q.shape)} in {q.dtype} on "
            f"{torch.cuda.get_device_name(q.device)}: take attention: eager, or enable a kernel (torch.backends.cuda)"
        )
    return kernel


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what torch.profiler must record to see where a step's time goes."""
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])


def allocates_like_cuda(device: torch.device) -> bool:
    """Tell whether a step's memory is that of an NVIDIA GPU: what differs is in planning.trace_step."""
    return device.type == "cuda"


def peak_is_measured(device: str) -> bool:
    """Tell whether the matmul peak is measured in every round, because no data sheet has it, or looked up."""
    return device != "cuda"


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


def why_skipped(switches: Switches, environment: Environment, run_slow_levels: bool) -> str | None:
    """Return why this machine cannot train at `switches`, or None where it can."""
    if switches.compile and environment.compile_problem:
        return f"torch.compile cannot work here: {environment.compile_problem}"
    if switches.allocator == "caching" and environment.device == "cpu" and platform.libc_ver()[0] != "glibc":
        return "allocator: caching is a setting of glibc, and this system's C library is another"
    if switches.precision != "bf16" or environment.bf16:
        return None
    if environment.device == "cuda":
        # without bf16 in hardware torch emulates it, but Inductor refuses to compile it
        return "torch.compile needs a GPU with bfloat16 for it: compute capability 8.0" if switches.compile else None
    if run_slow_levels:
        return None
    return "no bfloat16 in hardware here, it would be slower than float32; run_slow_levels: true trains it"


def note_for(switches: Switches, environment: Environment) -> str | None:
    """Return what a reader must know about a level trained at `switches` here, or None where there is nothing."""
    notes = []
    if switches.precision == "tf32" and environment.device != "cuda":
        notes.append("TF32 is a mode of NVIDIA GPUs: here the switch has no effect")
    elif switches.precision == "tf32" and not environment.bf16:
        notes.append("this GPU has no TF32, which came with compute capability 8.0: here the switch has no effect")
    elif switches.precision == "bf16" and not environment.bf16:
        notes.append("no bfloat16 hardware here: bf16 is emulated and slow")
    if switches.allocator == "caching" and environment.device != "cpu":
        notes.append("torch caches a GPU's memory by itself: here allocator: caching has no effect")
    return "; ".join(notes) or None
