"""Predict what a training step needs without computing it: its memory, the largest batch, and its least time.

A whole step is traced on fake tensors, which have a shape and a type but no storage; this takes a second for any size.
Not included: workspaces of libraries, fragmentation, and the driver's own memory. A compiled level is traced
uncompiled, so its memory is an upper bound, and only the matrix products count for its least time.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
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
LARGEST = 2**50  # bytes; larger steps are refused before tracing
RESERVE = 2**30  # bytes kept free, plus a tenth of the rest: for the driver, workspaces and fragmentation
SETTINGS = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # the values do not change what a step needs
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Operation:
    """The cost of one operator: floating-point operations of matrix products, and bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Step:
    """One traced training step: the peak of the bytes alive at once, and the operators of its two parts."""

    peak_bytes: int
    network: tuple[Operation, ...]
    optimizer: tuple[Operation, ...]


class LiveStorage(TorchDispatchMode):
    """Count the bytes of all live storages, real or fake; record their peak and the operators."""

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
    """Compute softmax in float32, as CUDA's autocast does and the CPU's does not."""
    softmax = F.softmax  # patched, because a TorchFunctionMode is off in backward, where a checkpoint repeats forward
    return patch.object(F, "softmax", lambda scores, dim: softmax(scores.float(), dim))


@cache
def trace_step(
    config: GPTConfig, precision: str, batch_size: int, block_size: int, cuda: bool, micro_batches: int = 1
) -> Step:
    """Trace a training step of GPT(config) on `micro_batches` micro-batches of (batch_size, block_size) ids.

    `cuda` traces as on an NVIDIA GPU, where AdamW updates all parameters at once, with a temporary copy of them. Raise
    UserError if the step needs more than LARGEST bytes.
    """
    scores = config.n_head * block_size * (config.attention == "eager")
    least = count_bytes(config, 4) + batch_size * block_size * (config.vocab_size + scores)
    if least > LARGEST:
        raise UserError(
            f"a step of {batch_size} x {block_size} tokens, n_layer {config.n_layer}, n_embd {config.n_embd}, "
            f"vocab_size {config.vocab_size} needs over {least / 2**30:,.0f} GiB of memory; lower a size in params.yaml"
        )
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


def largest_batch(config: GPTConfig, precision: str, block_size: int, cuda: bool, free: int) -> int:
    """Return the largest batch size whose step fits into `free` bytes minus the reserve; 0 if one row does not fit."""
    usable = 0.9 * free - RESERVE
    # memory is linear in the batch size, but for few rows, where the peak is in the optimizer's step
    low, high = (trace_step(config, precision, size, block_size, cuda).peak_bytes for size in (32, 64))
    size = max(1, 32 + int((usable - low) * 32 / (high - low)))
    while size and trace_step(config, precision, size, block_size, cuda).peak_bytes > usable:
        size -= 1
    return size


def least_ms(step: Step, gpu: str, precision: str, compiled: bool) -> float | None:
    """Return the least milliseconds of `step` on `gpu` by the roofline model; None if the GPU's peaks are unknown.

    Every operator takes as long as its arithmetic at the peak rate or its bytes at the memory's bandwidth, whichever is
    longer. Ideal compilation fuses all other operators into the matrix products, so only those count for `compiled`.

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
    """Return the operations of a matrix product, 0 for others; causal flash attention computes half of the square."""
    if FLASH in func.__name__:
        backward = "backward" in func.__name__
        B, H, T, D = args[1 if backward else 0].shape
        return (5 if backward else 2) * B * H * T * T * D
    count = flop_registry.get(func.overloadpacket)
    return count(*args, out_val=out) if count else 0
