"""Plant faults, and see which check finds them: `PYTHONPATH=src:. python -m experiments.power faults`.

A fault is planted in a network or in its training, at float32 and bfloat16. Then the step check of the benchmark runs,
and a short training, whose losses are compared as in the stage `parity`. `right` takes the errors of right runs of
every level, with several seeds, one and two threads; `right-fp32` of the same levels in float32. `write` writes the
tables of docs/evidence.md from all files.
"""

import argparse
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from experiments import pages
from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import BASELINE, GPT2_VOCAB_SIZE, Recipe, Switches
from gpt2_ladder.measuring import loss_parity, step_check, turns
from gpt2_ladder.measuring.step_check import StepCheck
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.model import GPT, Block
from gpt2_ladder.params import Params
from gpt2_ladder.reporting import tables
from gpt2_ladder.training import capabilities, data, devices, loop, runtime
from pipeline import TRAIN_SHARD
from pipeline.environment import describe
from pipeline.parity import ROUNDING

CPU = torch.device("cpu")
B, T, MICRO_BATCH = 2, 256, 1  # as in the climb on a CPU, but in two micro-batches
STEPS = {"tiny": 10, "gpt2": 5}
SIZES, PRECISIONS = ("tiny", "gpt2"), ("fp32", "bf16")
PADDED, SEED, MOST = 50304, 1337, 99.0
TEST = "a test"  # finds what no level can show
KEYS = {
    "loss": "loss",
    "gradient": "gradient",
    "update": "update",
    "before": "curve, previous",
    "baseline": "curve, `fp32`",
}
PARITY, LEVELS = params_yaml.load().parity, params_yaml.load().levels
SAME_ROUNDING = {
    name
    for above, (name, row) in zip([*LEVELS.values()], [*LEVELS.items()][1:], strict=False)
    if all(getattr(row, switch) == getattr(above, switch) for switch in ROUNDING)
}
CONSTANT, WARM_UP = Recipe(), Recipe(lr_warmup_steps=5, schedule="cosine")


def errors_file(what: str, size: str) -> Path:
    """Return the file with the errors."""
    return Path(f"experiments/power/{what}-{size}.json")


# the errors of a step check by name, and at "before" and "baseline" the differences of each step's loss, in nats
Errors = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A fault, and how to plant it in an arm; `globally` patches the code of all arms meanwhile."""

    name: str
    plant: Callable[[Arm], Any] = lambda arm: None
    globally: Callable[[], Any] | None = None
    vocab_size: int = GPT2_VOCAB_SIZE
    recipe: Recipe = CONSTANT

    def patch(self) -> AbstractContextManager[object]:
        """Return the context in which the fault acts."""
        return self.globally() if self.globally else nullcontext()


def blocks(change: Callable[[Block], Any]) -> Callable[[Arm], None]:
    """Return a function that changes every block of an arm's network."""

    def plant(arm: Arm) -> None:
        for block in arm.model.h:
            change(block)

    return plant


def scale(factor: Callable[[int], float]) -> Callable[[Arm], None]:
    """Multiply the attention's scores by `factor` of the head size: its queries are multiplied."""

    def change(block: Block) -> None:
        C = block.attn.c_proj.in_features
        by = factor(C // block.attn.n_head)
        block.attn.c_attn.register_forward_hook(lambda _, __, y: torch.cat((by * y[..., :C], y[..., C:]), -1))

    return blocks(change)


def mask(diagonal: int) -> Callable[[Arm], None]:
    """Let a token attend to the tokens below `diagonal` only; 1 is right."""

    def change(block: Block) -> None:
        block.attn.future = torch.ones_like(block.attn.future).triu(diagonal)

    return blocks(change)


def change_targets(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arm], None]:
    """Train on `change(targets)`."""

    def plant(arm: Arm) -> None:
        def hook(_: object, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (ids[0], *map(change, ids[1:]))

        arm.model.register_forward_pre_hook(hook)

    return plant


def skip_layer(arm: Arm) -> None:
    """Leave out the block in the middle."""
    arm.model.h[len(arm.model.h) // 2].forward = lambda x: x


def set_eps(arm: Arm) -> None:
    """Give every LayerNorm another eps: 1e-6 instead of 1e-5."""
    for module in arm.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


def exact_gelu(block: Block) -> None:
    """Use GELU's exact formula."""
    block.mlp.forward = lambda x, mlp=block.mlp: mlp.c_proj(F.gelu(mlp.c_fc(x)))


def add_dropout(block: Block) -> None:
    """Set a tenth of the MLP's output to zero."""
    block.mlp.register_forward_hook(lambda _, __, y: F.dropout(y, 0.1))


def untie(arm: Arm) -> None:
    """Give the head weights of its own, with the same values."""
    weight = torch.nn.Parameter(arm.model.wte.weight.detach().clone())
    arm.model.lm_head.weight = weight
    arm.optimizer.add_param_group({"params": [weight]})


def half_loss(arm: Arm) -> None:
    """Compute the loss in bfloat16, with autocast off."""
    model = arm.model

    def forward(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = GPT.forward(model, x)[0]
        if y is None:
            return logits, None
        with torch.autocast("cpu", enabled=False):
            return logits.detach(), F.cross_entropy(logits.flatten(0, 1).bfloat16(), y.flatten()).float()

    model.forward = forward


def set_groups(**changes: Any) -> Callable[[Arm], None]:
    """Change settings of AdamW; a function gets the old value."""

    def plant(arm: Arm) -> None:
        for group in arm.optimizer.param_groups:
            group |= {key: change(group[key]) if callable(change) else change for key, change in changes.items()}

    return plant


def leave_out(arm: Arm) -> None:
    """Leave a bias out of AdamW's parameters."""
    bias, (group,) = arm.model.h[0].attn.c_proj.bias, arm.optimizer.param_groups
    group["params"] = [parameter for parameter in group["params"] if parameter is not bias]


def freeze(arm: Arm) -> None:
    """Freeze a bias."""
    arm.model.h[0].attn.c_proj.bias.requires_grad = False


def drop_gradient(arm: Arm) -> None:
    """Set the gradient of one block's attention to zero before AdamW's step."""
    weight = arm.model.h[-1].attn.c_proj.weight

    def hook(*_: object) -> None:
        weight.grad.zero_()

    arm.optimizer.register_step_pre_hook(hook)


def full_shares() -> Any:
    """Add the gradients of micro-batches instead of weighting them."""
    right = loop.split

    def split(batch: loop.Batch, micro_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        yield from ((x, y, 1.0) for x, y, _ in right(batch, micro_batch))

    return mock.patch.object(loop, "split", split)


def late_schedule() -> Any:
    """Set the learning rate of the next step."""
    right = loop.learning_rate_at
    return mock.patch.object(loop, "learning_rate_at", lambda step, *rest: right(step + 1, *rest))


def pad_targets(y: torch.Tensor) -> torch.Tensor:
    """Replace every 64th target by a token that does not exist."""
    return torch.where(torch.arange(y.numel()).view_as(y) % 64 == 0, PADDED - 1, y)


FAULTS = (
    Fault("scores times 2", scale(lambda _: 2.0)),
    Fault("scores times 1/D, not 1/sqrt(D)", scale(lambda head: head**-0.5)),
    Fault("scores times 1.05", scale(lambda _: 1.05)),
    Fault("mask off by one", mask(2)),
    Fault("no mask", mask(10_000)),
    Fault("targets shifted by one", change_targets(lambda y: y.roll(-1, dims=1))),
    Fault("a layer skipped", skip_layer),
    Fault("LayerNorm's eps 1e-6, not 1e-5", set_eps),
    Fault("exact GELU, not tanh", blocks(exact_gelu)),
    Fault("head not tied", untie),
    Fault("dropout of 0.1 in the MLPs", blocks(add_dropout)),
    Fault("loss in bfloat16", half_loss),
    Fault("learning rate 1 % higher", set_groups(lr=lambda rate: 1.01 * rate)),
    Fault("no weight decay", set_groups(weight_decay=0.0)),
    Fault("weight decay 0.1, not 0.01", set_groups(weight_decay=0.1)),
    Fault("beta2 0.95, not 0.999", set_groups(betas=(0.9, 0.95))),
    Fault("a bias frozen", freeze),
    Fault("a bias left out of AdamW", leave_out),
    Fault("one gradient dropped", drop_gradient),
    Fault("1 target in 64 a padded token", change_targets(pad_targets), vocab_size=PADDED),
    Fault("micro-batches added, not weighted", globally=full_shares),
    Fault("learning-rate schedule one step early", globally=late_schedule, recipe=WARM_UP),
)


def make_arm(params: Params, switches: Switches, seed: int) -> Arm:
    """Return a new arm with weights of its own."""
    seeded = params.model_copy(update={"seed": seed})
    return turns.build_arms(seeded, {"arm": switches}, CPU, MICRO_BATCH)[0]


def train(params: Params, arm: Arm, batches: Sequence[loop.Batch], recipe: Recipe = CONSTANT) -> list[float]:
    """Return the losses of a training."""

    def rate(step: int) -> float:
        return loop.learning_rate_at(step, len(batches), params.size.learning_rate, recipe)

    autocast, scheduled = runtime.set_precision(arm.precision, CPU), recipe != CONSTANT
    parts = arm.model, arm.optimizer, batches, autocast, CPU, MICRO_BATCH
    steps = list(loop.train(*parts, learning_rate=rate if scheduled else None, scaler=arm.scaler))
    runtime.set_precision(runtime.DEFAULT, CPU)
    return [step.loss for step in steps]


def differences(losses: Sequence[float], others: Sequence[float], expected: float = 0.0) -> list[float]:
    """Return the difference at each step, in nats, beyond the cost `expected` of a padded vocabulary."""
    apart = (loss - other for loss, other in zip(losses, others, strict=True))
    return [max(min(0.0, expected) - each, each - max(0.0, expected), 0.0) if each == each else MOST for each in apart]


def check(params: Params, arm: Arm, batch: loop.Batch, seed: int = 0) -> StepCheck:
    """Return the errors of an arm's steps from weights of `seed`."""
    with mock.patch.object(step_check, "sharpen", partial(step_check.sharpen, seed=seed)):
        return step_check.check(arm, batch, CPU, params.size.learning_rate, params.optimizer)


def read_batches(first: int, count: int) -> list[loop.Batch]:
    """Return `count` batches of the training text, from number `first` on."""
    return list(islice(data.Batches(data.open_shard(TRAIN_SHARD), B, T), first, first + count))


def errors_of(result: StepCheck) -> Errors:
    """Return the three errors of a step check, at most MOST, because JSON has no infinity."""
    errors = {"loss": result.loss, "gradient": result.gradient, "update": result.update}
    return {name: error if error < MOST else MOST for name, error in errors.items()}


def run_faults(size: str, _: int) -> dict[str, dict[str, Errors]]:
    """Return the errors of each fault by precision; "before" and "baseline" are of its losses, in nats."""
    params, batches = params_yaml.load().model_copy(update={"model": size}), read_batches(0, STEPS[size])
    found: dict[str, dict[str, Errors]] = {}
    for precision in PRECISIONS:
        curves: dict[tuple[str, int, int], list[float]] = {}
        for fault in FAULTS:
            row = {"precision": precision, "vocab_size": fault.vocab_size}
            switches = params.levels[BASELINE].model_copy(update=row)
            kind = fault.vocab_size, fault.recipe.lr_warmup_steps
            for name in (BASELINE, precision):
                if (name, *kind) not in curves:
                    arm = make_arm(params, switches.model_copy(update={"precision": name}), SEED)
                    curves[name, *kind] = train(params, arm, batches, fault.recipe)
            gc.collect()
            with fault.patch():
                arm = make_arm(params, switches, SEED)
                fault.plant(arm)
                errors = errors_of(check(params, arm, batches[0]))
                arm = make_arm(params, switches, SEED)
                fault.plant(arm)
                losses = train(params, arm, batches, fault.recipe)
            for key, name in (("before", precision), ("baseline", BASELINE)):
                errors[key] = differences(losses, curves[name, *kind])
            found.setdefault(precision, {})[fault.name] = errors
            print(size, precision, fault.name, errors, flush=True)
    return found


def run_right(size: str, seeds: int, precision: str | None = None) -> dict[str, list[Errors]]:
    """Return the errors of right runs by level, over `seeds` seeds with one and two threads.

    With `precision`, all levels use it.
    """
    settings = params_yaml.load()
    params, environment = settings.model_copy(update={"model": size}), describe()
    speed = {name: row for name, row in settings.levels.items() if row.group == "speed"}
    left_out = {*capabilities.rows_without_effect(settings.levels, environment), *(["bf16"] if precision else [])}
    changes = {"precision": precision} if precision else {}
    levels = {
        name: capabilities.effective(row.model_copy(update=changes), environment)
        for name, row in speed.items()
        if name not in left_out
    }
    found: dict[str, list[Errors]] = {name: [] for name in levels}
    for seed, threads in itertools.product(range(seeds), (2, 1)):
        torch.set_num_threads(threads)
        batches, curves, above = read_batches(seed * STEPS[size], STEPS[size]), {}, BASELINE
        for name, switches in levels.items():
            torch._dynamo.reset()
            gc.collect()  # frees the networks of the level before
            errors = errors_of(check(params, make_arm(params, switches, seed), batches[0], seed))
            curves[name] = train(params, make_arm(params, switches, seed), batches)
            for key, other in (("before", above), ("baseline", BASELINE)):
                expected = loss_parity.padding_cost(switches.vocab_size, levels[other].vocab_size)
                errors[key] = differences(curves[name], curves[other], expected)
            found[name].append(errors)
            above = name
            print(size, seed, threads, name, errors, flush=True)
    return found


def checked(errors: Errors) -> dict[str, float]:
    """Return the errors that a check sees: of a loss curve, the largest in the first steps."""
    seen = {"before": max(errors["before"][: PARITY.steps]), "baseline": max(errors["baseline"][: PARITY.steps])}
    return {**errors, **seen}


def limits(precision: str) -> dict[str, float]:
    """Return the tolerance of each error at `precision`."""
    steps = {"loss": step_check.LOSS[precision], "gradient": step_check.GRADIENT[precision]}
    curves = {"before": PARITY.previous_level, "baseline": getattr(PARITY, precision)}
    return {**steps, "update": step_check.UPDATE, **curves}


def cell(errors: Mapping[str, float], most: Mapping[str, float]) -> str:
    """Name the checks that find a fault, with its errors."""
    words = {"before": "curve to previous", "baseline": "curve to `fp32`"}
    by = {words.get(key, key): error for key, error in errors.items() if not error <= most[key]}
    texts = (f"{name} {'missing' if error == MOST else f'{error:.0e}'}" for name, error in by.items())
    return ", ".join(texts) or "not found"


def write() -> None:
    """Write both tables into the page."""

    def read(what: str) -> dict[str, Any]:
        return {size: json.loads(path.read_text()) for size in SIZES if (path := errors_file(what, size)).exists()}

    parts = []
    for size, found in read("faults").items():
        rows = [["fault", *PRECISIONS]]
        for fault in FAULTS:
            cells = [cell(checked(found[precision][fault.name]), limits(precision)) for precision in PRECISIONS]
            rows.append([fault.name, *(cells if fault.recipe == CONSTANT else [TEST] * len(PRECISIONS))])
        parts += [f"`model: {size}`:", tables.markdown_table(rows, len(rows[0]))]
    pages.put(pages.EVIDENCE, "power", "\n\n".join(parts))
    rows = [["model", "level", "precision", "runs", *KEYS.values(), "false alarms"]]
    for what in ("right", "right-fp32"):
        for size, name, runs in ((size, *item) for size, levels in read(what).items() for item in levels.items()):
            precision = "fp32" if what == "right-fp32" else params_yaml.load().levels[name].precision
            most, errors = limits(precision), [*map(checked, runs)]
            if name not in SAME_ROUNDING:
                most["before"] = math.inf
            alarms = sum(any(not run[key] <= most[key] for key in KEYS) for run in errors)
            largest = (f"{max(run[key] for run in errors):.1e}" for key in KEYS)
            rows.append([size, f"`{name}`", precision, str(len(runs)), *largest, str(alarms)])
    pages.put(pages.EVIDENCE, "right runs", tables.markdown_table(rows, 3))


RUNS: dict[str, Callable[[str, int], Any]] = {
    "faults": run_faults,
    "right": run_right,
    "right-fp32": partial(run_right, precision="fp32"),
}


def main() -> None:
    """Plant the faults, or run right trainings, and save the errors; or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RUNS, "write"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--seeds", type=int, default=6, help="of the right runs")
    arguments = parser.parse_args()
    if arguments.what == "write":
        write()
        return
    devices.keep_freed_memory(CPU)
    for size in arguments.sizes:
        files.write_json(errors_file(arguments.what, size), RUNS[arguments.what](size, arguments.seeds))


if __name__ == "__main__":
    main()
