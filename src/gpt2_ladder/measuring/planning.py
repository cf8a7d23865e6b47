"""Predict a training step's memory, its least time, and the largest batch that fits, without running the step.

The step is traced on fake tensors, which have a shape and a type but no storage. This takes a second for any size.
The predicted memory leaves out libraries' workspaces, fragmentation and the driver's memory. Compiled levels are traced
without compilation, so their predicted memory is an upper bound.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gpt2_ladder.config import AdamW, GPTConfig, UserError
from gpt2_ladder.measuring.cost import BANDWIDTH, KNOWN_PEAKS
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.training import loop, runtime

CPU = torch.device("cpu")  # on a machine without a GPU, autocast works only for fake tensors on the CPU
LARGEST = 2**50  # bytes; a step that needs more is not traced
RESERVE = 2**30  # bytes kept free for the driver, workspaces and fragmentation, plus a tenth of all
SETTINGS = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # any values: memory and time do not depend on them
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Operation(NamedTuple):
    """The cost of one operator."""

    flops: int  # of a matrix product; 0 for all other operators
    bytes: int  # read and written


class Step(NamedTuple):
    """One traced training step."""

    peak_bytes: int  # the largest memory in use at any time
    network: tuple[Operation, ...]  # operators of forward and backward
    optimizer: tuple[Operation, ...]  # operators of the optimizer's step


class LiveStorage(TorchDispatchMode):
    """Record the bytes that all tensors use, their peak, and the cost of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operations: list[Operation] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = [self._watch(tensor.untyped_storage()) for tensor in _tensors(out)]
        if any(new) or func._schema.is_mutable:  # otherwise the result is a view, which moves no bytes
            moved = {id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors((args, kwargs, out))}
            self.operations.append(Operation(_flops(func, args, out), sum(moved.values())))
        return out

    def _watch(self, storage: torch.UntypedStorage) -> bool:
        if storage._cdata in self._known:
            return False
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return True

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def softmax_like_cuda() -> AbstractContextManager[object]:
    """Return a context that computes softmax in float32. Autocast does so on CUDA, but not on a CPU."""
    softmax = F.softmax  # patched: activation checkpointing repeats it in backward, without a TorchFunctionMode
    return patch.object(F, "softmax", lambda scores, dim: softmax(scores.float(), dim))


@cache
def trace_step(
    config: GPTConfig, precision: str, batch_size: int, block_size: int, cuda: bool, micro_batches: int = 1
) -> Step:
    """Trace a training step of GPT(config) on `micro_batches` micro-batches of (batch_size, block_size) ids.

    If `cuda`, trace the step as it runs on an NVIDIA GPU: AdamW updates all parameters at once and needs a temporary
    copy of them. Raise UserError if the step needs more than LARGEST bytes.
    """
    if config.attention != "eager":
        config = config.model_copy(update={"attention": "flash"})  # a CPU lacks the named kernels
    scores = config.n_head * block_size * (config.attention == "eager")
    least = count_bytes(config, 4) + batch_size * block_size * (config.vocab_size + scores)
    if least > LARGEST:
        sizes = f"n_layer {config.n_layer}, n_embd {config.n_embd}, vocab_size {config.vocab_size}"
        need = f"needs over {least / 2**30:,.0f} GiB of memory; lower these values"
        raise UserError(f"a step of {batch_size} x {block_size} tokens, {sizes} {need}")
    with FakeTensorMode(), LiveStorage() as storage, softmax_like_cuda() if cuda else nullcontext():
        model = GPT(config, seed=None)
        optimizer = loop.make_optimizer(model, 1.0, SETTINGS)
        optimizer.param_groups[0]["foreach"] = cuda
        ids = torch.zeros(micro_batches * batch_size, block_size, dtype=torch.int64)
        autocast = runtime.set_precision(precision, CPU)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates AdamW's state, as the first step of a training does
        optimizer.zero_grad()
        storage.peak, storage.operations = storage.live, []
        loop.accumulate(model, (ids, ids), autocast, CPU, micro_batch=batch_size)
        split = len(storage.operations)
        optimizer.step()
        return Step(storage.peak, tuple(storage.operations[:split]), tuple(storage.operations[split:]))


def fitting_rows(
    config: GPTConfig, precision: str, batch_size: int, block_size: int, cuda: bool, free: int, most: int | None = None
) -> int:
    """Return how many rows of a batch fit into `free` bytes at a time: `most`, half of it, a quarter ...; or 0."""
    rows = batch_size if most is None else most
    while rows and free < trace_step(config, precision, rows, block_size, cuda, 1 + (rows < batch_size)).peak_bytes:
        rows //= 2
    return rows


def largest_batch(config: GPTConfig, precision: str, block_size: int, cuda: bool, free: int) -> int:
    """Return the largest batch size whose step fits into `free` bytes minus the reserve; 0 if one row does not fit."""
    usable = 0.9 * free - RESERVE
    # memory grows linearly with the batch size, except for small batches: they peak in the optimizer's step
    low, high = (trace_step(config, precision, size, block_size, cuda).peak_bytes for size in (32, 64))
    size = max(1, 32 + int((usable - low) * 32 / (high - low)))
    while size and trace_step(config, precision, size, block_size, cuda).peak_bytes > usable:
        size -= 1
    return size


def least_ms(step: Step, gpu: str, precision: str, compiled: bool) -> float | None:
    """Return the least milliseconds of `step` on `gpu` by the roofline model; None if the GPU's peaks are unknown.

    An operator takes at least the time of its arithmetic at the peak rate, and of its bytes at the memory's bandwidth.
    If `compiled`, forward and backward count only matrix products, as if all other operators were fused into them.

    Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
    """
    peak, bandwidth = KNOWN_PEAKS.get(gpu, {}).get(precision), BANDWIDTH.get(gpu)
    if peak is None or bandwidth is None:
        return None
    operations = [*(operation for operation in step.network if operation.flops or not compiled), *step.optimizer]
    return 1000 * sum(max(each.flops / (peak * 1e12), each.bytes / (bandwidth * 1e9)) for each in operations)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _flops(func: Any, args: Any, out: Any) -> int:
    """Return the FLOPs of a matrix product or of causal flash attention, half of the full square; 0 for the others."""
    if FLASH in func.__name__:
        backward = "backward" in func.__name__
        B, H, T, D = args[1 if backward else 0].shape
        return (5 if backward else 2) * B * H * T * T * D
    count = flop_registry.get(func.overloadpacket)
    return count(*args, out_val=out) if count else 0
