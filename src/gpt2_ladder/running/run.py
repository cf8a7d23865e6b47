"""What the three training stages (overfit, train, trial) share: build, follow, record."""

import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2_ladder.config import Environment, Params, Recipe, Shape, Switches, UserError
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.running import progress, tracking
from gpt2_ladder.running.checkpoints import Checkpoints
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training import devices, loop, ranks, runtime
from gpt2_ladder.training.metrics import Step

PLAIN = Recipe()  # of every level


def build(
    params: Params, switches: Switches, environment: Environment, decay: str = "all", count: int = 1
) -> tuple[torch.device, GPT, torch.optim.Optimizer]:
    """Return the device, of `count` ranks this one's, the network with `switches` on it, seeded, and its optimizer."""
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    if count > 1:
        device = devices.join_ranks(device, environment.threads)
    if switches.allocator == "caching":
        devices.keep_freed_memory(device)
    need = count_bytes(params.gpt(switches), 4)  # weights, gradients, AdamW's two moments
    devices.check_memory(device, need, f"training {params.model} with vocab_size {switches.vocab_size}")
    model = GPT(params.gpt(switches), params.seed).to(device)
    if switches.compile:
        runtime.compile_model(model)
    optimizer = loop.make_optimizer(model, params.size.learning_rate, params.optimizer, switches.fused_adamw, decay)
    return device, model, optimizer


def attention_kernel(
    params: Params, switches: Switches, rows: int, block_size: int, device: torch.device
) -> str | None:
    """Return which kernel attends at `switches` to `rows` x `block_size` tokens; None where it is written out."""
    if switches.attention == "eager":
        return None
    size, kind = params.size, runtime.PRECISIONS[switches.precision].dtype
    shape = (rows, size.n_head, block_size, size.n_embd // size.n_head)  # (B, H, T, D)
    return devices.attention_kernel(torch.empty(shape, dtype=kind, device=device, requires_grad=True))


def describe(
    name: str,
    params: Params,
    switches: Switches,
    shape: Shape,
    environment: Environment,
    recipe: Recipe = PLAIN,
    count: int = 1,
) -> dict[str, Any]:
    """Return the resolved configuration of one training: what W&B compares runs by, and a checkpoint belongs to."""
    return {
        **switches.model_dump(),
        **shape.model_dump(),
        **params.size.model_dump(),
        **params.optimizer.model_dump(),
        **recipe.model_dump(),
        **{"level": name, "model": params.model, "machine": params.machine, "seed": params.seed},
        **{"deterministic": params.deterministic, "devices": count},
        **{"data": params.data.source, "shuffle": params.data.shuffle},
        "environment": environment.model_dump(),
    }


def open_tracker(job_type: str, described: dict[str, Any], csv: Path) -> Tracker:
    """Return a Tracker that writes to `csv` and to a new W&B run with the configuration that `describe` returned.

    That of a rank other than the first writes nowhere.
    """
    if ranks.rank():
        return Tracker(None, None)
    found = Environment.model_validate(described["environment"])
    tags = [described["model"], found.device, described["precision"], described["attention"]]
    run = tracking.start_run(described["level"], job_type, tags, described, tracking.run_group(found.fingerprint))
    return Tracker(csv, run)


def follow(
    steps: Iterable[Step], tracker: Tracker, title: str, total: int, resumed: int = 0, saved: Checkpoints | None = None
) -> list[Step]:
    """Carry a training through: show and record each of its `total` steps, and save as `saved` asks; return them all.

    The first `resumed` of `steps` were taken, and saved, before an interruption.

    Raises:
        UserError: loss or gradient are no longer numbers, or a signal asked to stop; what is saved by then stays.
    """
    seen: list[Step] = []
    with stopping(saved is not None) as signals:
        for step in progress.show(steps, title, total):
            tracker.log(step)
            seen.append(step)
            if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
                raise UserError(
                    f"{title}: at step {step.step} the loss is {step.loss}, the gradient's norm {step.grad_norm}; "
                    f"lower models.*.learning_rate{_last_good(saved)}"
                )
            if saved and len(seen) > resumed:
                asked = [name for names in ranks.gather(signals) for name in names]  # all of them stop after one step
                if asked or len(seen) % saved.every == 0:
                    if ranks.rank() == 0:
                        saved.save(seen)
                    ranks.gather(None)  # nobody stops before it is there
                if asked and len(seen) < total:
                    raise UserError(f"{title}: stopped by {asked[0]} after step {step.step}{_last_good(saved)}")
    return seen


@contextmanager
def stopping(wanted: bool) -> Iterator[list[str]]:
    """Have SIGTERM and Ctrl-C, if `wanted`, wait for the end of a step; yield those that came. A second one kills."""
    came: list[str] = []

    def note(number: int, _: object) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for kind in (signal.SIGTERM, signal.SIGINT) if wanted else ():
        before[kind] = signal.signal(kind, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_good(saved: Checkpoints | None) -> str:
    newest = saved.newest() if saved else None
    return f"; the last good checkpoint, from which the next run goes on, is {newest}" if newest else ""
