"""What the three training stages (overfit, train, trial) share: build, follow, record."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from gpt2_ladder import devices, progress, runtime, tracking, training
from gpt2_ladder.config import Environment, Params, Recipe, Shape, Switches, UserError
from gpt2_ladder.metrics import Step
from gpt2_ladder.model import GPT
from gpt2_ladder.tracking import Tracker

PLAIN = Recipe()  # of every level


def build(
    params: Params, switches: Switches, environment: Environment, decay: str = "all"
) -> tuple[torch.device, GPT, torch.optim.Optimizer]:
    """Return the device, the network with `switches` on it, seeded, and its optimizer."""
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    if switches.allocator == "caching":
        devices.keep_freed_memory(device)
    model = GPT(params.gpt(switches), params.seed).to(device)
    if switches.compile:
        runtime.compile_model(model)
    optimizer = training.make_optimizer(model, params.size.learning_rate, params.optimizer, switches.fused_adamw, decay)
    return device, model, optimizer


def attention_kernel(
    params: Params, switches: Switches, rows: int, block_size: int, device: torch.device
) -> str | None:
    """Return which kernel attends at `switches` to `rows` x `block_size` tokens; None where it is written out."""
    if switches.attention == "eager":
        return None
    size, kind = params.size, torch.bfloat16 if switches.precision == "bf16" else torch.float32
    shape = (rows, size.n_head, block_size, size.n_embd // size.n_head)  # (B, H, T, D)
    return devices.attention_kernel(torch.empty(shape, dtype=kind, device=device, requires_grad=True))


def open_tracker(
    name: str,
    job_type: str,
    params: Params,
    switches: Switches,
    shape: Shape,
    environment: Environment,
    csv: Path,
    recipe: Recipe = PLAIN,
) -> Tracker:
    """Return a Tracker that writes to `csv` and to a new W&B run with the resolved configuration."""
    config = {
        **switches.model_dump(),
        **shape.model_dump(),
        **params.size.model_dump(),
        **params.optimizer.model_dump(),
        **recipe.model_dump(),
        **{"level": name, "model": params.model, "machine": params.machine, "seed": params.seed},
        "environment": environment.model_dump(),
    }
    tags = [params.model, environment.device, switches.precision, switches.attention]
    run = tracking.start_run(name, job_type, tags, config, tracking.run_group(environment.fingerprint))
    return Tracker(csv, run)


def follow(steps: Iterable[Step], tracker: Tracker, title: str, total: int) -> list[Step]:
    """Carry a training through: show and record each of its `total` steps, then return them all.

    Raises:
        UserError: the loss is no longer a number.
    """
    seen = []
    for step in progress.show(steps, title, total):
        tracker.log(step)
        seen.append(step)
        if not math.isfinite(step.loss):
            raise UserError(f"{title}: the loss is {step.loss} at step {step.step}; lower models.*.learning_rate")
    return seen
