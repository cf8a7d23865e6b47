"""The training loop. It is the same at every level; the differences are its arguments."""

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, get_total_norm

from gpt2_ladder import config
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, memory, metrics, ranks
from gpt2_ladder.training.devices import Moment, Reading
from gpt2_ladder.training.metrics import Step
from gpt2_ladder.training.runtime import NO_SCALER

Batch = devices.Batch
Autocast = AbstractContextManager[object]  # around forward and loss


class AdamW(torch.optim.AdamW):
    """AdamW without torch's wrappers that keep it out of compiled graphs: here it never is, and they import Dynamo."""

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def make_optimizer(
    model: GPT, learning_rate: float, settings: config.AdamW, fused: bool = False, decay: str = "all"
) -> torch.optim.AdamW:
    """Return AdamW over all parameters; `fused` updates them in one kernel.

    If `decay` is "matrices", biases and LayerNorms have no weight decay; if it is "all", all parameters have it.
    """
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if decay == "matrices":
        vectors = [parameter for parameter in parameters if parameter.dim() < 2]
        matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(
        groups,
        lr=learning_rate,
        fused=fused or None,  # False would also disable torch's foreach update on a GPU
        **settings.model_dump(),
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
    model: nn.Module,
    batch: Batch,
    autocast: Autocast,
    device: torch.device,
    micro_batch: int,
    scaler: GradScaler = NO_SCALER,
) -> Tensor:
    """Add the gradient of the mean loss over `batch`, a pair of int64 (B, T), to the gradients; return that loss.

    `micro_batch` rows go through the network at a time. Fewer rows need less memory and give the same gradient, up to
    rounding. Only forward and loss run under `autocast`. Ranks exchange gradients once, with the last rows. `scaler`
    scales the gradients, not the returned loss.
    """
    total = torch.zeros((), device=device)
    parts = list(split(batch, micro_batch))
    for number, (x, y, share) in enumerate(parts, 1):
        with ranks.no_sync_if(number < len(parts), model):
            with autocast:
                loss = model(x, y)[1]  # drops the logits, which would add to the peak memory
            scaler.scale(loss * share).backward()
        total += loss.detach() * share
    return total


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    autocast: Autocast,
    device: torch.device,
    micro_batch: int,
    clip_norm: float | None = None,
    scaler: GradScaler = NO_SCALER,
) -> tuple[Tensor, Tensor | None]:
    """Train on one batch, a pair of int64 (B, T) on the device, without waiting for the device.

    If `scaler` finds an overflow in the gradient, the weights stay as they are. Without fused AdamW, it must wait.

    Returns:
        The loss before the update, and the gradient's norm before clipping; this norm is None if `clip_norm` is None.

    Raises:
        UserError: memory ran out in the optimizer's step, after which only some parameters may be updated.
    """
    optimizer.zero_grad()
    loss = accumulate(model, batch, autocast, device, micro_batch, scaler)
    scaler.unscale_(optimizer)
    norm = None if clip_norm is None else clip_grad_norm_(model.parameters(), clip_norm)
    try:
        scaler.step(optimizer)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in the optimizer's step, which needs the same memory for any micro-batch: {error}; set a "
            "smaller model in params.yaml (`make plan` shows what fits)"
        ) from None
    scaler.update()
    return loss, norm


def timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    autocast: Autocast,
    device: torch.device,
    micro_batch: int,
    scaler: GradScaler = NO_SCALER,
) -> float:
    """Train on one batch, a pair of int64 (B, T), and return the milliseconds from an idle device to an idle device.

    The clock starts when the batch is on the device.
    """
    batch = devices.send(batch, device)
    devices.synchronize(device)
    start = time.perf_counter()
    train_step(model, optimizer, batch, autocast, device, micro_batch, scaler=scaler)
    devices.synchronize(device)
    return (time.perf_counter() - start) * 1000


@dataclass(frozen=True)
class Launched:
    """A step that the device may not have finished."""

    index: int
    micro_batch: int
    tokens: int  # of this rank
    begin: Moment  # of the loop
    start: Moment  # the end of the step before, or the launch if the device was idle
    numbers: Reading  # the loss and the gradient's norm

    def read(self) -> Step:
        """Wait for the end of this step, but not for later ones, and return its record."""
        loss, norm = self.numbers.read()
        end = self.numbers.end
        step_ms, seconds = end.milliseconds_since(self.start), end.milliseconds_since(self.begin) / 1000
        rate = metrics.tokens_per_second(self.tokens * ranks.count(), step_ms)
        return Step(self.index, ranks.mean(loss), step_ms, rate, norm, self.micro_batch, seconds)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    autocast: Autocast,
    device: torch.device,
    micro_batch: int,
    first_step: int = 0,
    learning_rate: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    settle: Callable[[int], bool] = lambda steps: False,
    may_halve: bool = True,
    scaler: GradScaler = NO_SCALER,
) -> Iterator[Step]:
    """Train one step on each batch, a pair of int64 (B, T), and yield its Step. Steps are numbered from `first_step`.

    A step is launched before the previous one is read and yielded, so that the device need not wait for the host. If
    `settle(n)` is true, the first n steps are yielded before the next one is launched: the caller sees the weights
    after n steps. An error comes after all steps before it.

    If memory runs out and the micro-batch `may_halve`, the step is repeated with half of it, and later steps keep it.
    On several ranks, `batches` has this rank's rows, but a Step describes the whole batch. `learning_rate` maps a
    step's number to its learning rate; gradients are clipped to norm `clip_norm`. Raise UserError if memory runs out
    with one row, or where the micro-batch cannot be halved.
    """
    model.train()
    begin, outstanding = Moment(device), list[Launched]()
    try:
        for index, batch in enumerate(batches, first_step):
            if learning_rate:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(index)
            sent = devices.send(batch, device)
            while True:
                start = outstanding[-1].numbers.end if outstanding else Moment(device)
                try:
                    loss, norm = train_step(model, optimizer, sent, autocast, device, micro_batch, clip_norm, scaler)
                    break
                except (RuntimeError, MemoryError) as error:
                    reason = memory.why_out_of_memory(error)
                yield from _read(outstanding)
                micro_batch = memory.halve(micro_batch, reason, device, may_halve)
            if norm is None:  # every level records it
                norm = get_total_norm(
                    [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
                )
            outstanding.append(Launched(index, micro_batch, batch[0].numel(), begin, start, Reading(loss, norm)))
            yield from _read(outstanding, but=1)
            if settle(index + 1):
                yield from _read(outstanding)
    except Exception:
        yield from _read(outstanding)
        raise
    yield from _read(outstanding)


def _read(outstanding: list[Launched], but: int = 0) -> Iterator[Step]:
    """Yield the records of the `outstanding` steps, but not of the last `but`, and remove them from the list."""
    while len(outstanding) > but:
        yield outstanding.pop(0).read()


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Batch], autocast: Autocast, device: torch.device, micro_batch: int) -> float:
    """Return the mean loss in nats over `batches`, all of the same shape. The network runs uncompiled."""
    model.eval()
    losses, shares = [], []
    forward: Callable[..., Any] = model.forward  # not `model`, which would be compiled again for inference
    for batch in batches:
        for x, y, share in split(devices.send(batch, device), micro_batch):
            with autocast:
                losses.append(forward(x, y)[1])
            shares.append(share)
    return sum(map(operator.mul, Reading(*losses).read(), shares)) / sum(shares)
