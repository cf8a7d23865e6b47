"""Continue with half the micro-batch where memory ran out."""

from collections.abc import Callable

import torch

from gpt2_ladder.config import UserError
from gpt2_ladder.training import devices, ranks


def within_memory(step: Callable[[int], object], micro_batch: int, device: torch.device) -> int:
    """Call `step(micro_batch)`, halving micro_batch until memory suffices, and return the micro_batch.

    Raise UserError if memory runs out with one row, or on one of several ranks, which cannot repeat a step alone.
    """
    while True:
        try:
            step(micro_batch)
            return micro_batch
        except (RuntimeError, MemoryError) as error:
            reason = why_out_of_memory(error)
        micro_batch = halve(micro_batch, reason, device)


def why_out_of_memory(error: Exception) -> str:
    """Return the message of an out-of-memory `error`, whose traceback would keep the activations; raise others."""
    if not devices.is_out_of_memory(error):
        raise error
    return " ".join(str(error).split())


def halve(micro_batch: int, reason: str, device: torch.device, may_halve: bool = True) -> int:
    """Return half of `micro_batch`, with which memory ran out, and release the device's cached memory.

    Raise UserError with one row, on one of several ranks, which cannot repeat a step alone, or without `may_halve`.
    """
    if ranks.count() > 1:
        raise UserError(
            f"out of memory on rank {ranks.rank()} with {micro_batch} rows at a time ({reason}); lower "
            "machines.*.batch_size, because a rank cannot use fewer rows than the others"
        )
    if not may_halve:
        fix = "set cuda_graphs: false, or a smaller batch_size, because its step cannot be split"
        raise UserError(f"out of memory with {micro_batch} rows at a time ({reason}); {fix}")
    if micro_batch == 1:
        fix = "set a smaller model (`make plan` shows what fits)"
        raise UserError(f"out of memory with one row at a time ({reason}); {fix}")
    print(f"out of memory with {micro_batch} rows at a time, continuing with {micro_batch // 2} ({reason})", flush=True)
    devices.reset_peak_memory(device)
    return micro_batch // 2
