"""The training loop, the same at every level: what differs between levels comes in as an argument."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gpt2_ladder import config, metrics, runtime
from gpt2_ladder.metrics import Step
from gpt2_ladder.model import GPT

Batch = tuple[Tensor, Tensor]


def make_optimizer(model: GPT, learning_rate: float, settings: config.AdamW) -> torch.optim.AdamW:
    """Return plain AdamW, not fused, over all parameters at a constant learning rate."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    autocast: AbstractContextManager[object],
    device: torch.device,
) -> tuple[Tensor, float]:
    """Train on one batch, a pair of int64 (B, T); return its loss before the update, and how many ms that took.

    `autocast` is entered around forward and loss only. The batch reaches the device before the clock starts.
    """
    x, y = (ids.to(device) for ids in batch)  # (B, T) each
    runtime.synchronize(device)
    start = time.perf_counter()
    optimizer.zero_grad()
    with autocast:
        _, loss = model(x, y)
    loss.backward()
    optimizer.step()
    runtime.synchronize(device)
    return loss.detach(), (time.perf_counter() - start) * 1000


def train(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    autocast: AbstractContextManager[object],
    device: torch.device,
) -> Iterator[Step]:
    """Train on each of `batches` and yield its Step as soon as it is done.

    The clock stops before the yield: what the consumer does with a Step (logging, drawing, writing) is not timed.
    """
    model.train()
    for index, batch in enumerate(batches):
        loss, step_ms = train_step(model, optimizer, batch, autocast, device)
        yield Step(index, loss.item(), step_ms, metrics.tokens_per_second(batch[0].numel(), step_ms))


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[Batch], autocast: AbstractContextManager[object], device: torch.device
) -> float:
    """Return the mean loss in nats over `batches`, all of one shape, without compiling for it."""
    model.eval()
    losses = []
    with torch.compiler.set_stance("force_eager"):  # a compiled model would compile once more for inference
        for x, y in batches:
            with autocast:
                losses.append(model(x.to(device), y.to(device))[1].item())
    return sum(losses) / len(losses)
