"""The training loop. It is the same at every level; the differences are its arguments."""

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
    """Return AdamW over all parameters; `fused` updates them in one kernel.

    If `decay` is "matrices", biases and LayerNorms have no weight decay; if it is "all", all parameters have it.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if decay == "all":
        groups = [{"params": list(model.parameters())}]
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused or None,  # False would also disable torch's foreach update on a GPU
    )


def learning_rate_at(step: int, steps: int, learning_rate: float, recipe: config.Recipe) -> float:
    """Return the learning rate at step number `step`, counted from 0, in a training that has `steps` steps.

    It rises linearly to `learning_rate` during the warm-up. Then it stays there, or follows half a cosine down to a
    tenth at the last step.

    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix B.
    """
    if step < recipe.lr_warmup_steps:
        return learning_rate * (step + 1) / recipe.lr_warmup_steps
    if recipe.schedule == "constant":
        return learning_rate
    done = (step - recipe.lr_warmup_steps) / max(1, steps - 1 - recipe.lr_warmup_steps)
    return learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def split(batch: Batch, micro_batch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield the micro-batches of `batch`: x and y, (micro_batch, T) each, and their share of the batch's rows."""
    for x, y in zip(*(ids.split(micro_batch) for ids in batch), strict=True):
        yield x, y, len(x) / len(batch[0])


def accumulate(
    model: nn.Module, batch: Batch, autocast: AbstractContextManager[object], device: torch.device, micro_batch: int
) -> Tensor:
    """Add the gradient of the mean loss over `batch`, a pair of int64 (B, T), to the gradients; return that loss.

    `micro_batch` rows go through the network at a time. Fewer rows need less memory and give the same gradient, up to
    rounding. Only forward and loss run under `autocast`. Ranks exchange gradients once, with the last rows.
    """
    total = torch.zeros((), device=device)
    parts = list(split(batch, micro_batch))
    for number, (x, y, share) in enumerate(parts, 1):
        with ranks.no_sync_if(number < len(parts), model):
            with autocast:
                loss = model(x, y)[1]  # drops the logits, which would add to the peak memory
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
    """Train on one batch, a pair of int64 (B, T).

    The clock starts when the batch is on the device.

    Returns:
        The loss before the update, the step's milliseconds, and the gradient's norm before clipping; this norm is None
        if `clip_norm` is None.

    Raises:
        UserError: memory ran out in the optimizer's step, after which only some parameters may be updated.
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
            f"out of memory in the optimizer's step, which needs the same memory for any micro-batch: {error}; set a "
            "smaller model in params.yaml (`make plan` shows what fits)"
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
    may_halve: bool = True,
) -> Iterator[Step]:
    """Train one step on each batch, a pair of int64 (B, T), and yield its Step. Steps are numbered from `first_step`.

    The caller's work between steps (logging, writing) is not timed. If memory runs out and the micro-batch `may_halve`,
    the step is repeated with half of it, and later steps keep it. On several ranks, `batches` has this rank's rows, but
    a Step describes the whole batch. `learning_rate` maps a step's number to its learning rate; gradients are clipped
    to norm `clip_norm`. Raise UserError if memory runs out with one row, or where the micro-batch cannot be halved.
    """
    model.train()
    for index, batch in enumerate(batches, first_step):
        if learning_rate:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(index)
        step = partial(train_step, model, optimizer, batch, autocast, device, clip_norm=clip_norm)
        (loss, step_ms, norm), micro_batch = within_memory(step, micro_batch, device, may_halve)
        if norm is None:  # every level records it, outside the clock
            norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        rate = metrics.tokens_per_second(batch[0].numel() * ranks.count(), step_ms)
        yield Step(index, ranks.mean(loss.item()), step_ms, rate, norm.item(), micro_batch)


def within_memory(
    step: Callable[[int], Result], micro_batch: int, device: torch.device, may_halve: bool = True
) -> tuple[Result, int]:
    """Call `step(micro_batch)`, halving micro_batch until memory suffices; return its result and the micro_batch.

    Raise UserError with one row, on one of several ranks, which cannot repeat a step alone, or without `may_halve`.
    """
    while True:
        try:
            return step(micro_batch), micro_batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())  # not the error: its traceback keeps the activations alive
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
        print(
            f"out of memory with {micro_batch} rows at a time, continuing with {micro_batch // 2} ({reason})",
            flush=True,
        )
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
    """Return the mean loss in nats over `batches`, all of the same shape. The network runs uncompiled."""
    model.eval()
    losses = []
    with torch.compiler.set_stance("force_eager"):  # a compiled model would compile again for inference
        for batch in batches:
            losses.append(0.0)
            for x, y, share in split(batch, micro_batch):
                with autocast:
                    losses[-1] += model(x.to(device), y.to(device))[1].item() * share
    return sum(losses) / len(losses)
