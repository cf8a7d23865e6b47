"""Training steps of several levels in one process, taken in turn, so that their ratios hold on a machine that drifts.

Trained one after the other, two levels meet two different machines: other programs, clocks and temperatures come and
go within minutes. Taken in turn, both meet the same one in every round. The order is drawn anew for each round,
because what a step leaves behind (caches, the allocator's free lists) costs the next one up to 12 %: in a fixed or
rotated cycle that would always be the same neighbour.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import torch

from gpt2_ladder.config import MINIMUM_ROUNDS, AdamW, GPTConfig
from gpt2_ladder.measuring.gains import Round
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop, runtime
from gpt2_ladder.training.devices import matmul_tflops

Result = TypeVar("Result")


@dataclass(frozen=True)
class Arm:
    """One contestant: a network, its optimizer, the precision at which it trains, and how many rows at a time."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    precision: str
    micro_batch: int

    def step(self, batch: loop.Batch, device: torch.device) -> float:
        """Train on `batch` at this arm's precision, return the milliseconds, and leave float32 behind."""
        autocast = runtime.set_precision(self.precision, device)
        try:
            return loop.train_step(self.model, self.optimizer, batch, autocast, device, self.micro_batch)[1]
        finally:
            runtime.set_precision(runtime.DEFAULT, device)

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return `work(arm, *arguments)`."""
        return work(self, *arguments)


@dataclass(frozen=True)
class RemoteArm:
    """An arm in a process of its own, because one of its switches, the allocator, sets the whole process.

    Attributes:
        name: of the level.
        process: an executor of one worker.
        open: called there with `name` for the arm itself: a function of a module, which remembers what it returned.
    """

    name: str
    process: ProcessPoolExecutor
    open: Callable[[str], Arm]

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return `work(arm, *arguments)`, done there while this process waits."""
        return self.process.submit(_do, self.open, self.name, work, arguments).result()


def step_as_compiled(arm: Arm, batch: loop.Batch, device: torch.device) -> float:
    """Return the milliseconds of a step; one that compiles once more raises RuntimeError."""
    with torch.compiler.set_stance("fail_on_recompile"):
        return arm.step(batch, device)


def _do(open_arm: Callable[[str], Arm], name: str, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    return work(open_arm(name), *arguments)


class Weights:
    """One set of parameters and optimizer state for every shape of network, lent to all arms of that shape.

    Seven copies of 124M parameters with AdamW's state would take 14 GB, shared ones take 4. What a step costs does not
    depend on the values.
    """

    def __init__(self, seed: int, learning_rate: float, settings: AdamW, device: torch.device):
        self._seed, self._learning_rate, self._settings, self._device = seed, learning_rate, settings, device
        self._owners: dict[tuple[int, bool], GPT] = {}
        self._optimizers: dict[tuple[int, bool, bool], torch.optim.Optimizer] = {}

    def lend(self, config: GPTConfig, fused: bool = False) -> tuple[GPT, torch.optim.Optimizer]:
        """Return a new network of `config` on the shared parameters, and an optimizer of those, `fused` or not."""
        shape = (config.vocab_size, config.tie_weights)
        if shape not in self._owners:
            self._owners[shape] = GPT(config, self._seed).to(self._device)
        owner = self._owners[shape]
        if (*shape, fused) not in self._optimizers:  # a state of its own: on a GPU the two keep it in different places
            optimizer = loop.make_optimizer(owner, self._learning_rate, self._settings, fused)
            self._optimizers[*shape, fused] = optimizer
        with torch.device("meta"):
            model = GPT(config, seed=None)
        # keep_vars, because a plain state_dict() holds detached tensors: two tied names would become two parameters
        model.load_state_dict(owner.state_dict(keep_vars=True), assign=True)
        return model.to(self._device), self._optimizers[*shape, fused]


def warm_up(
    arms: Sequence[Arm | RemoteArm], batch: loop.Batch, device: torch.device, seed: int, steps: int = 2
) -> Iterator[str]:
    """Take `steps` untimed steps of every arm, the first of which compiles; yield the name before each.

    The orders are drawn, so that the allocator has met more than one of them before the clock runs.
    """
    dice = random.Random(seed)
    for _ in range(steps):
        for arm in dice.sample(arms, len(arms)):
            yield arm.name
            arm.run(Arm.step, batch, device)


def measure(
    arms: Sequence[Arm | RemoteArm],
    batches: Sequence[loop.Batch],
    device: torch.device,
    rounds: int,
    seconds: float,
    seed: int,
    matmuls: Sequence[str] = (),
) -> Iterator[Round]:
    """Yield `rounds` rounds, or as many as fit into `seconds` but MINIMUM_ROUNDS at least.

    A step that compiles once more raises RuntimeError: it would be measured as one that does not.

    Args:
        arms: warmed up.
        batches: taken in turn, one a round.
        device: where the arms live.
        rounds: how many at most.
        seconds: when to stop: before a round that would probably end later.
        seed: what the orders are drawn from.
        matmuls: precisions ("fp32", "bf16") at which a bare matrix product is timed in every round as well.
    """
    dice, start = random.Random(seed), time.perf_counter()
    for index, batch in zip(range(rounds), cycle(batches), strict=False):
        elapsed = time.perf_counter() - start
        if index >= MINIMUM_ROUNDS and elapsed * (index + 1) / index > seconds:
            return
        order = dice.sample(arms, len(arms))
        step_ms = {arm.name: arm.run(step_as_compiled, batch, device) for arm in order}
        peaks = {precision: matmul_tflops(precision, device) for precision in matmuls}
        yield Round(order=list(step_ms), step_ms={arm.name: step_ms[arm.name] for arm in arms}, matmul_tflops=peaks)
