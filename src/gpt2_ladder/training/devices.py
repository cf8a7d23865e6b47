"""Adapt to the device. Only this module and capabilities.py distinguish NVIDIA GPUs from CPUs."""

import ctypes
import os
import resource
import sys
import time
from contextlib import nullcontext

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_ladder import ledger
from gpt2_ladder.config import GPTConfig, UserError
from gpt2_ladder.model import KERNELS
from gpt2_ladder.training.precisions import PRECISIONS
from gpt2_ladder.training.runtime import DEFAULT, operand_type, set_precision

Batch = tuple[torch.Tensor, torch.Tensor]  # the ids of a batch and the ids that follow, int64 (B, T) each
FIX_DRIVER = "fix the driver, or hide the GPU with CUDA_VISIBLE_DEVICES='' to train on the CPU"
PRODUCT_SIZES = {"cpu": 2048, "cuda": 8192}  # keep two cores busy for 0.05 to 0.1 s, an H100 for 1 to 22 ms
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "could not create a memory object", "STATUS_ALLOC_FAILED")


@ledger.phase("device")
def open_device(name: str, threads: int, seed: int, deterministic: bool) -> torch.device:
    """Set CPU threads, seed and deterministic algorithms for the process, and return the device "cuda" or "cpu".

    Raise UserError if torch sees a GPU but results/environment.json has none, or the reverse.
    """
    torch.set_num_threads(threads)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's order; CUDA's default is fastest first
    if name == "cpu" and torch.cuda.is_available():
        raise UserError(f"nvidia-smi lists no GPU, but torch {torch.__version__} sees one: {FIX_DRIVER}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"this machine has a GPU, but torch {torch.__version__} cannot use it: {FIX_DRIVER}")
    torch.manual_seed(seed)
    set_deterministic(deterministic)
    # MKL selects a function's kernel at the first call. If two threads make that call at the same time, the kernel may
    # have half the digits (pytorch/pytorch#188792). So the first square root is taken here, not in AdamW.
    torch.ones(1).sqrt()
    return torch.device(name)


def check_count(name: str, count: int) -> None:
    """Raise UserError if the device `name` is "cuda" and this machine has fewer than `count` GPUs."""
    if name == "cuda" and (available := torch.cuda.device_count()) < count:
        raise UserError(
            f"devices = {count}, but this machine has {available} GPUs: set devices: {available}, or start the ranks "
            "on several machines with torchrun (see docs/gpu.md)"
        )


def join_ranks(device: torch.device, threads: int) -> torch.device:
    """Connect the ranks that torchrun started, with NCCL on GPUs or gloo on CPUs, and return this rank's device.

    The ranks of one machine share its `threads`. Raise UserError if torchrun started more ranks on this machine than it
    has GPUs.
    """
    local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    check_count(device.type, local_count)
    torch.set_num_threads(max(1, threads // local_count))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # GPUs need gloo too, because ranks also exchange Python objects
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def set_deterministic(enabled: bool) -> None:
    """Switch deterministic algorithms on or off for the process. To switch them on, call this before any GPU work."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product on a GPU
    if enabled != torch.are_deterministic_algorithms_enabled():  # this call imports Inductor, which takes a second
        torch.use_deterministic_algorithms(enabled)
    # torch would also fill new memory with NaN, to reveal code that reads it too early. That only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in torch's stubs


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work; a GPU's kernels run asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Moment:
    """The end of all work that the device has been given so far; the host does not wait for it."""

    def __init__(self, device: torch.device):
        self._seconds = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until this moment; later work may still run."""
        if self._event:
            self._event.synchronize()

    def milliseconds_since(self, earlier: "Moment") -> float:
        """Return the milliseconds between two moments that are over."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event)
        return (self._seconds - earlier._seconds) * 1000


class Reading:
    """Numbers on their way from the device to the host. All that a training reads from the device comes this way."""

    def __init__(self, *numbers: torch.Tensor):
        # a copy, so that later work can overwrite the numbers; torch pins the memory of such a copy on the host
        self._values = torch.stack(numbers).to("cpu", non_blocking=True)
        self.end = Moment(numbers[0].device)

    def read(self) -> list[float]:
        """Wait until the numbers have arrived, but not for later work of the device, and return them."""
        self.end.wait()
        return list(self._values.tolist())


def send(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` on the device. A GPU copies it later: torch keeps its pinned copy on the host until then."""
    if device.type == "cpu":
        return batch
    return batch[0].pin_memory().to(device, non_blocking=True), batch[1].pin_memory().to(device, non_blocking=True)


def peak_memory_mib(device: torch.device, reserved: bool = False) -> float:
    """Return the peak memory in MiB: of torch's allocator on a GPU, of the whole process on a CPU.

    If `reserved`, it is what the allocator holds, since the replay of a CUDA graph allocates nothing.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated)(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


def reset_peak_memory(device: torch.device) -> None:
    """Release a GPU's cached memory and restart the measurement of its peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep freed CPU memory for the next step, until the process ends. On a GPU, torch always does so.

    By default, glibc returns large freed buffers to the kernel, and every step waits for new pages: 130,000 to 330,000
    page faults per step of GPT-2 124M at B=2, T=256; after this call, none. Raise RuntimeError if glibc refuses.
    """
    if device.type != "cpu":
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    # all buffers come from the heap, which never shrinks; free() would unmap a buffer with its own mapping
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        raise RuntimeError("mallopt: glibc refuses to keep freed memory")


def free_memory(device: torch.device) -> int:
    """Return how many bytes of the device's memory are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(device: torch.device, need: int, what: str) -> None:
    """Raise UserError if `what` needs more bytes than the device has free."""
    if need > (free := free_memory(device)):
        sizes = f"{need / 1e9:,.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise UserError(f"{what} needs {sizes}: free memory, or set a smaller model or vocab_size in params.yaml")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` means that memory ran out. CUDA has a type for it; a CPU raises a plain RuntimeError."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)
    )


def attention_kernel(config: GPTConfig, precision: str, rows: int, block_size: int, device: torch.device) -> str | None:
    """Return the kernel of attention for (rows, block_size) ids, a name in torch.nn.attention.SDPBackend; eager: None.

    Raise UserError if the device lacks the kernel that `config` names, or if a GPU would use the math kernel, which
    writes the (B, H, T, T) matrix as `eager` does.
    """
    if config.attention == "eager":
        return None
    shape, dtype = (rows, config.n_head, block_size, config.n_embd // config.n_head), operand_type(precision)
    q, named = torch.empty(shape, dtype=dtype, device=device, requires_grad=True), KERNELS.get(config.attention)
    try:
        with sdpa_kernel(named) if named else nullcontext():
            kernel = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    except RuntimeError:  # the named kernel cannot compute this
        kernel = "ERROR"
    if kernel != "ERROR" and not (kernel == "MATH" and device.type == "cuda"):
        return kernel
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    lacks = f"torch has no {config.attention} kernel" if named else "torch has only its math kernel"
    fix = "set attention: flash, torch's own choice" if named else "set attention: eager"
    raise UserError(f"attention: {config.attention}, but {lacks} for {shape} in {dtype} on {place}: {fix}")


def allocates_like_cuda(device: torch.device) -> bool:
    """Return whether `device` allocates memory as an NVIDIA GPU does; see planning.trace_step for the differences."""
    return device.type == "cuda"


def peak_is_measured(device: str) -> bool:
    """Return whether the peak is the rate of a bare matrix product; for GPUs, data sheets give it."""
    return device != "cuda"


def product_precision(precision: str, device: str) -> str:
    """Return the precision of the bare matrix product for `precision`; CPUs multiply TF32 as float32."""
    return precision if device == "cuda" else PRECISIONS[precision].operand


def matmul_tflops(precision: str, device: torch.device, repeats: int = 3) -> float:
    """Return the TFLOP/s of a bare square matrix product: the best of `repeats` runs, after one untimed run.

    Other programs can only slow a product down, so the best one counts. The process then has the precision DEFAULT.
    """
    size = PRODUCT_SIZES[device.type]
    a, seconds = torch.randn(size, size, device=device).to(operand_type(precision)), []
    set_precision(precision, device)
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    set_precision(DEFAULT, device)
    return 2 * size**3 / min(seconds[1:]) / 1e12
