"""Data parallel training: several processes, the ranks, one a device; what they share, and what they tell each other.

torchrun starts them and `devices.join_ranks` brings them together. Alone, everything here does nothing.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


def count() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this process is, from 0, which alone logs and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(model: nn.Module) -> nn.Module:
    """Return `model` such that backward leaves the mean of all ranks' gradients, and with the weights of rank 0."""
    if count() == 1:
        return model
    # attention masks are the same everywhere; gradients lie in the buffers that are sent instead of beside them
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def no_sync_if(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Return a context for forward and backward in which, if `wanted`, gradients are added up here and not yet sent."""
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else nullcontext()


def gather(value: Value) -> list[Value]:
    """Return every rank's `value`, in their order, on all of them, which wait for each other here."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def mean(value: float) -> float:
    """Return the mean of every rank's `value`."""
    return math.fsum(gather(value)) / count()


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
