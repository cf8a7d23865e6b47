"""Data parallel training: the communication between processes (ranks), one for each device.

torchrun starts the ranks and `devices.join_ranks` connects them. In a single process these functions do nothing.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


def count() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank. Only rank 0 logs and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(model: nn.Module) -> nn.Module:
    """Wrap `model` so that all ranks start from rank 0's weights and backward averages the gradients over the ranks."""
    if count() == 1:
        return model
    # attention masks need no synchronization; gradients are views into the communication buffers, to save memory
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def no_sync_if(condition: bool, model: nn.Module) -> AbstractContextManager[None]:
    """If `condition`, return a context in which backward does not average gradients over the ranks."""
    return model.no_sync() if condition and isinstance(model, DistributedDataParallel) else nullcontext()


def gather(value: Value) -> list[Value]:
    """Return the `value` of every rank, in rank order; all ranks wait for each other here."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def mean(value: float) -> float:
    """Return the mean of `value` over all ranks."""
    return math.fsum(gather(value)) / count()


def leave() -> None:
    """Disconnect from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
