"""Benchmark the levels in rounds: in each round, every level takes one training step, in random order.

The speed of a machine changes within minutes, with other programs, clock rates and temperatures. So two trainings, one
after the other, cannot be compared, but the steps of one round can. The order is random, because a step changes caches
and the allocator's free lists, and so the time of the next step by up to 12 %.
"""

import pickle
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch.amp import GradScaler

from gpt2_ladder import ledger
from gpt2_ladder.config import MINIMUM_ROUNDS, Environment, GPTConfig, Switches
from gpt2_ladder.measuring.gains import Round
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.training import capabilities, devices, loop, runtime

Result = TypeVar("Result")


@dataclass(frozen=True)
class Arm:
    """One level in the benchmark."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    precision: str
    micro_batch: int  # rows of a batch that go through the network at a time
    scaler: GradScaler = runtime.NO_SCALER

    def step(self, batch: loop.Batch, device: torch.device) -> float:
        """Train on `batch` and return the step's milliseconds."""
        return self.take(loop.timed_step, batch, device)

    def take(self, step: Callable[..., Result], batch: loop.Batch, device: torch.device) -> Result:
        """Return what `step`, a function of loop.py, returns at this arm's precision; then restore float32.

        A step in float16 whose gradient overflowed is repeated, because AdamW skips it. The scale is then halved.
        """
        autocast = runtime.set_precision(self.precision, device)
        try:
            while True:
                scale, parts = self.scaler.get_scale(), (self.model, self.optimizer)
                result = step(*parts, batch, autocast, device, self.micro_batch, scaler=self.scaler)
                if self.scaler.get_scale() >= scale:
                    return result
        finally:
            runtime.set_precision(runtime.DEFAULT, device)

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return `function(self, *arguments)`."""
        return function(self, *arguments)


@dataclass(frozen=True)
class RemoteArm:
    """An arm in another process, because one of its switches, the allocator, applies to a whole process."""

    name: str
    process: ProcessPoolExecutor  # with one worker
    open: Callable[[str], Arm]  # builds the arm from its name in `process`, only once; can be pickled

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return `function(arm, *arguments)`, called in the arm's process."""
        return self.process.submit(_run, self.open, self.name, function, arguments).result()


def _run(open_arm: Callable[[str], Arm], name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    return function(open_arm(name), *arguments)


def step_as_compiled(arm: Arm, batch: loop.Batch, device: torch.device) -> float:
    """Take one step and return its milliseconds. Raise RuntimeError if the network would be compiled again."""
    with torch.compiler.set_stance("fail_on_recompile"):
        return arm.step(batch, device)


class SharedWeights:
    """Build networks that share their parameters and optimizer state, to save memory.

    Networks with the same vocab_size and tie_weights share them. Seven copies of 124M parameters with AdamW's
    state would need 14 GB; shared, they need 4 GB. The time of a step does not depend on the values of the weights.
    """

    def __init__(self, params: Params, device: torch.device):
        self._params, self._device = params, device
        self._owners: dict[tuple[int, bool], GPT] = {}
        self._optimizers: dict[tuple[int, bool, bool], torch.optim.Optimizer] = {}

    def build(self, config: GPTConfig, fused: bool = False) -> tuple[GPT, torch.optim.Optimizer]:
        """Return a new network that uses the shared parameters, and their shared optimizer, `fused` or not."""
        shape = (config.vocab_size, config.tie_weights)
        if shape not in self._owners:
            self._owners[shape] = GPT(config, self._params.seed).to(self._device)
        owner = self._owners[shape]
        if (*shape, fused) not in self._optimizers:  # on a GPU fused and other AdamW keep state in different places
            settings = self._params.size.learning_rate, self._params.optimizer
            self._optimizers[*shape, fused] = loop.make_optimizer(owner, *settings, fused)
        with torch.device("meta"):
            model = GPT(config, seed=None)
        # without keep_vars the tensors would be detached, and tied weights would become two parameters
        model.load_state_dict(owner.state_dict(keep_vars=True), assign=True)
        return model.to(self._device), self._optimizers[*shape, fused]


@ledger.phase("weights")
def build_arms(params: Params, levels: Mapping[str, Switches], device: torch.device, micro_batch: int) -> list[Arm]:
    """Return one arm per level; the networks share their weights."""
    weights, arms = SharedWeights(params, device), []
    for name, switches in levels.items():
        model, optimizer = weights.build(params.gpt(switches), switches.fused_adamw)
        if switches.compile:
            runtime.compile_model(model, switches.autotune, switches.cuda_graphs)
        how = switches.precision, micro_batch, runtime.make_scaler(switches.precision, device)
        arms.append(Arm(name, model, optimizer, *how))
    return arms


def open_arms(
    params: Params, environment: Environment, micro_batch: int, levels: Mapping[str, Switches]
) -> dict[str, Arm]:
    """Return the arms of `levels` by name, without switches that have no effect; set up this process for them."""
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    if any(capabilities.needs_own_process(switches, environment) for switches in levels.values()):
        devices.keep_freed_memory(device)
    acting = {name: capabilities.effective(switches, environment) for name, switches in levels.items()}
    return {arm.name: arm for arm in build_arms(params, acting, device, micro_batch)}


def place_arms(
    params: Params,
    environment: Environment,
    micro_batch: int,
    levels: Mapping[str, Switches],
    apart: Collection[str],
    process: ProcessPoolExecutor,
) -> list[Arm | RemoteArm]:
    """Return one arm per level. Those in `apart` run in `process`, which gets its memory in another way."""
    far = {name: levels[name] for name in apart}
    here = open_arms(params, environment, micro_batch, {name: levels[name] for name in levels if name not in far})
    there = partial(_open_arm, pickle.dumps((params, environment, micro_batch, far)))
    return [here.get(name) or RemoteArm(name, process, there) for name in levels]


def _open_arm(settings: bytes, name: str) -> Arm:
    return _open_arms(settings)[name]


@cache
def _open_arms(settings: bytes) -> dict[str, Arm]:  # bytes, because @cache needs arguments with a hash
    return open_arms(*pickle.loads(settings))


def warm_up(
    arms: Sequence[Arm | RemoteArm], batch: loop.Batch, device: torch.device, seed: int, cuda_graphs: bool = False
) -> Iterator[str]:
    """Take two untimed steps of every arm, in random order. Yield the arm's name before each step.

    With `cuda_graphs`, take three: the first runs a network, the second records its graphs, the third replays them.
    """
    generator = random.Random(seed)
    for _ in range(3 if cuda_graphs else 2):
        for arm in generator.sample(arms, len(arms)):
            yield arm.name
            with ledger.phase("compile"):
                arm.run(Arm.step, batch, device)


def measure(
    arms: Sequence[Arm | RemoteArm],
    batches: Sequence[loop.Batch],
    device: torch.device,
    rounds: int,
    seconds: float,
    seed: int,
    matmuls: Sequence[str] = (),
    least: int = MINIMUM_ROUNDS,
) -> Iterator[Round]:
    """Take one step of every arm in each round, and yield the rounds. Call `warm_up` first: it compiles the networks.

    Stop after `rounds` rounds, or earlier if the next round would end after `seconds`, but not before `least` rounds. A
    round uses one of `batches`, in order, and times a bare matrix product at every precision in `matmuls`. Raise
    RuntimeError if a network would be compiled again, because the step's time would include the compilation.
    """
    generator, start = random.Random(seed), time.perf_counter()
    for index, batch in zip(range(rounds), cycle(batches), strict=False):
        elapsed = time.perf_counter() - start
        if index >= least and elapsed * (index + 1) / index > seconds:
            return
        order = generator.sample(arms, len(arms))
        with ledger.phase("steps"):
            step_ms = {arm.name: arm.run(step_as_compiled, batch, device) for arm in order}
        peaks = {precision: devices.matmul_tflops(precision, device) for precision in matmuls}
        yield Round(order=list(step_ms), step_ms={arm.name: step_ms[arm.name] for arm in arms}, matmul_tflops=peaks)
