"""The training loop, the same at every level: what differs between levels comes in as an argument."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from gpt2_ladder import config
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.training import metrics, ranks
from gpt2_ladder.training.devices import is_out_of_memory, reset_peak_memory, synchronize
from gpt2_ladder.training.metrics import Step

Batch = tuple[Tensor, Tensor]
Result = TypeVar("Result")


def make_optimizer(
    model: GPT, learning_rate: float, settings: config.AdamW, fused: bool = False, decay: str = "all"
) -> torch.optim.AdamW:
    """Return AdamW over all parameters; `fused` updates them all in one kernel.

    `decay`: "all", or "matrices" for weight decay on weights and embeddings only and not on biases and LayerNorms.
    """
    decaying = [parameter for parameter in model.parameters() if decay == "all" or parameter.dim() >= 2]
    groups: list[dict[str, Any]] = [{"params": decaying}]
    if decay == "matrices":
        groups.append({"params": [one for one in model.parameters() if one.dim() < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused or None,  # False would also forbid torch to update many parameters at once on a GPU
    )


def learning_rate_at(step: int, steps: int, learning_rate: float, recipe: config.Recipe) -> float:
    """Return the learning rate of `step`, from 0, of `steps`.

    It rises linearly to `learning_rate` over the warm-up, and then stays, or falls along half a cosine to a tenth at
    the last step.

    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix B.
    """
    if step < recipe.lr_warmup_steps:
        return learning_rate * (step + 1) / recipe.lr_warmup_steps
    if recipe.schedule == "constant":
        return learning_rate
    done = (step - recipe.lr_warmup_steps) / max(1, steps - 1 - recipe.lr_warmup_steps)
    return learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def split(batch: Batch, micro_batch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield `micro_batch` rows of `batch` after another, (micro_batch, T) twice, and their share of all its rows."""
    for x, y in zip(*(ids.split(micro_batch) for ids in batch), strict=True):
        yield x, y, len(x) / len(batch[0])


def accumulate(
    model: nn.Module, batch: Batch, autocast: AbstractContextManager[object], device: torch.device, micro_batch: int
) -> Tensor:
    """Add the gradient of the mean loss over `batch`, int64 (B, T) twice, to the parameters', and return that loss.

    `micro_batch` rows at a time go through the network: fewer need less memory and give the same sum, up to rounding.
    `autocast` is entered around forward and loss only. Ranks send their gradients once, with the last rows.
    """
    total = torch.zeros((), device=device)
    parts = list(split(batch, micro_batch))
    for number, (x, y, share) in enumerate(parts, 1):
        with ranks.no_sync_if(model, number < len(parts)):
            with autocast:
                loss = model(x, y)[1]  # the logits are let go: held until the step ends, they would add to its peak
            (loss * share).backward()
        total += loss.detach() * share
    return total


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    autocast: AbstractContextManager[object],
    device: torch.device,
    micro_batch: int,
    clip_norm: float | None = None,
) -> tuple[Tensor, float, Tensor | None]:
    """Train on one batch, a pair of int64 (B, T); return its loss before the update, and how many ms that took.

    A gradient whose norm is over `clip_norm` is scaled down to it; what its norm was is returned as well.

    The batch reaches the device before the clock starts.

    Raises:
        UserError: memory ran out in the optimizer's step, which leaves some parameters updated and others not.
    """
    batch = batch[0].to(device), batch[1].to(device)  # (B, T) each
    synchronize(device)
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = accumulate(model, batch, autocast, device, micro_batch)
    norm = None if clip_norm is None else clip_grad_norm_(model.parameters(), clip_norm)
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in the optimizer's step, which no smaller micro-batch makes smaller: {error}; "
            "`make plan` says what fits here"
        ) from None
    synchronize(device)
    return loss, (time.perf_counter() - start) * 1000, norm


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    autocast: AbstractContextManager[object],
    device: torch.device,
    micro_batch: int,
    first_step: int = 0,
    learning_rate: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
) -> Iterator[Step]:
    """Train on each of `batches`, the first of which is that of `first_step`; yield every Step as soon as it is done.

    `learning_rate` sets that of every step, by its index; a gradient over `clip_norm` is scaled down to it.

    Where memory runs out, the step is taken again from the same rows with half the micro-batch, and so are all that
    follow. The clock stops before the yield: what the consumer does with a Step (logging, writing) is not timed.

    Each of several ranks gets its share of every batch; a Step tells of the whole batch.

    Raises:
        UserError: memory runs out with a micro-batch of one row, or with any on one of several ranks.
    """
    model.train()
    for index, batch in enumerate(batches, first_step):
        if learning_rate:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(index)
        step = partial(train_step, model, optimizer, batch, autocast, device, clip_norm=clip_norm)
        (loss, step_ms, norm), micro_batch = within_memory(step, micro_batch, device)
        if norm is None:  # recorded at every level, outside the clock
            norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        rate = metrics.tokens_per_second(batch[0].numel() * ranks.count(), step_ms)
        yield Step(index, ranks.mean(loss.item()), step_ms, rate, norm.item(), micro_batch)


def within_memory(step: Callable[[int], Result], micro_batch: int, device: torch.device) -> tuple[Result, int]:
    """Take `step` with `micro_batch` rows at a time, or half as many, and so on; return its result and how many.

    Raises:
        UserError: memory runs out with one row, or on one of several ranks, which cannot take a step again by itself.
    """
    while True:
        try:
            return step(micro_batch), micro_batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())  # its text alone: the traceback would keep the activations alive
        if ranks.count() > 1:
            raise UserError(
                f"out of memory on rank {ranks.rank()} with {micro_batch} rows at a time ({reason}); no rank can halve "
                "them alone: lower machines.*.batch_size"
            )
        if micro_batch == 1:
            raise UserError(f"out of memory with one row at a time ({reason}); `make plan` says what fits here")
        print(f"out of memory with {micro_batch} rows at a time, on with {micro_batch // 2} ({reason})", flush=True)
        micro_batch //= 2
        reset_peak_memory(device)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    autocast: AbstractContextManager[object],
    device: torch.device,
    micro_batch: int,
) -> float:
    """Return the mean loss in nats over `batches`, all of one shape, `micro_batch` rows at a time; nothing compiles."""
    model.eval()
    losses = []
    with torch.compiler.set_stance("force_eager"):  # a compiled model would compile once more for inference
        for batch in batches:
            losses.append(0.0)
            for x, y, share in split(batch, micro_batch):
                with autocast:
                    losses[-1] += model(x.to(device), y.to(device))[1].item() * share
    return sum(losses) / len(losses)
