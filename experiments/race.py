"""Compare the time of a training step with transformers' GPT-2: `PYTHONPATH=src:. python experiments/race.py`.

Every implementation has its own process, and they take steps in turn, at each of CELLS. The table is written into
docs/performance.md. `--contestant my_gpt.py:GPT` adds a network, loaded as pipeline.tools.check does, or
`module:function` a function (cell) -> step. A step takes ids and targets, int64 (B, T) each, trains on them, from
zero_grad to the optimizer's step, and returns the loss.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from inspect import isclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import pages
from gpt2_ladder.checking import behaviour, loading
from gpt2_ladder.config import AdamW, GPTConfig, Size
from gpt2_ladder.measuring import cost, gains, profiling
from gpt2_ladder.measuring.cost import Operator
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, loop, runtime
from pipeline import environment

Step = Callable[..., float]
OURS, THEIRS = "experiments.race:ours", "experiments.race:transformers"
SHAPES = ((2, 256), (4, 64))
SIZE = Size(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
VOCAB_SIZE, LEARNING_RATE = 50257, 3e-4
SETTINGS = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)  # torch's own


@dataclass(frozen=True)
class Cell:
    """One setting: shape, precision ("fp32" or "bf16"), compiled or not, and whether glibc keeps freed memory."""

    batch_size: int
    block_size: int
    precision: str
    compile: bool
    keep_memory: bool = True


CELLS = [
    Cell(*shape, precision, compiled) for shape, precision, compiled in product(SHAPES, ("fp32", "bf16"), (False, True))
]


def ours(cell: Cell) -> Step:
    """Return the step of this project's GPT with eager attention, which is faster at these T."""
    return step_of(GPT(GPTConfig(**SIZE.model_dump(), attention="eager")), cell)


def step_of(model: nn.Module, cell: Cell) -> Step:
    """Return the step of `model`, which is called as our GPT, with fused AdamW."""
    device = torch.device("cpu")
    if cell.compile:
        runtime.compile_model(model)
    optimizer = loop.make_optimizer(model, LEARNING_RATE, SETTINGS, fused=True)
    autocast = runtime.set_precision(cell.precision, device)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        return loop.train_step(model, optimizer, (x, y), autocast, device, cell.batch_size)[0].item()

    return step


def transformers(cell: Cell) -> Step:
    """Return the step of a plain loop around transformers' GPT2LMHeadModel, with fused AdamW and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    if cell.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    autocast = runtime.set_precision(cell.precision, torch.device("cpu"))

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        optimizer.zero_grad()
        with autocast:
            loss = model(x, labels=y, shift_labels=y).loss  # y is already shifted
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@cache
def open_contestant(contestant: str, cell: Cell) -> Step:
    """Build the step of `contestant`, a network or a function, once in its process."""
    torch.set_num_threads(environment.describe().threads)
    if cell.keep_memory:
        devices.keep_freed_memory(torch.device("cpu"))
    factory = loading.load(contestant)
    if not (isclass(factory) and issubclass(factory, nn.Module)):
        return factory(cell)
    model = loading.Theirs(loading.build(factory, GPTConfig(**SIZE.model_dump()), {}))
    behaviour.set_dropout_to_zero(model)
    ids = torch.randint(VOCAB_SIZE, (2, 1, 8))
    behaviour.check_loss(model, *model.outputs(*ids), ids[1])  # to time one loss, not two
    return step_of(model, cell)


def take_step(contestant: str, cell: Cell, index: int) -> tuple[float, float]:
    """Take a step of `contestant` on batch `index` in its process; return the milliseconds and the loss."""
    step, generator = open_contestant(contestant, cell), torch.Generator().manual_seed(index)
    ids = torch.randint(VOCAB_SIZE, (cell.batch_size, cell.block_size + 1), generator=generator)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    start = time.perf_counter()
    loss = step(x, y)
    return (time.perf_counter() - start) * 1000, loss


def peak_tflops(precision: str) -> float:
    """Return the rate of a bare matrix product, in TFLOP/s."""
    return devices.matmul_tflops(precision, torch.device("cpu"))


def race(cell: Cell, contestants: Sequence[tuple[str, str, bool]], rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Return every contestant's milliseconds by round, and the rate of a bare matrix product in the same rounds."""
    generator = random.Random(1337)
    step_ms: dict[str, list[float]] = {name: [] for name, _, _ in contestants}
    losses: dict[str, float] = {}
    peaks = []
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name, _, _ in contestants
        }
        for index in range(-warm_up, rounds):
            for name, function, keep in generator.sample(contestants, len(contestants)):
                own = replace(cell, keep_memory=keep)
                ms, loss = processes[name].submit(take_step, function, own, warm_up + index).result()
                losses.setdefault(name, loss)
                if index >= 0:
                    step_ms[name].append(ms)
            if index >= 0:
                peaks.append(processes[contestants[0][0]].submit(peak_tflops, cell.precision).result())
    return {"cell": asdict(cell), "step_ms": step_ms, "first_losses": losses, "peak_tflops": peaks}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of all cells."""
    others = [name for name in results[0]["step_ms"] if name != "ours"]
    titles = ["B x T", "precision", "compiled", "ours ms", *(f"over {name}" for name in others), "of the peak"]
    rows = [titles, ["---"] * 3 + ["---:"] * (len(titles) - 3)]
    for result in results:
        cell, times = Cell(**result["cell"]), result["step_ms"]
        flops = cell.batch_size * cell.block_size * cost.flops_per_token(SIZE, cell.block_size)
        peaks = result["peak_tflops"]
        shares = [cost.tflops(flops, ms) / peak for ms, peak in zip(times["ours"], peaks, strict=True)]
        rows.append(
            [
                f"{cell.batch_size} x {cell.block_size}",
                cell.precision,
                "yes" if cell.compile else "no",
                f"{statistics.median(times['ours']):,.0f}",
                *(str(gains.gain(times[name], times["ours"])) for name in others),
                f"{statistics.median(shares):.0%}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def profile(contestant: str, cell: Cell) -> str:
    """Return a Markdown table of the costliest operators of a step, taken in its own process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        for index in range(8):  # until the heap no longer grows
            ms, _ = process.submit(take_step, contestant, cell, index).result()
        operators = process.submit(profile_here, contestant, cell).result()
    products = [operator for operator in operators if operator.name in ("aten::mm", "aten::addmm", "aten::bmm")]
    others = [operator for operator in operators if operator not in products]
    total = sum(operator.self_ms for operator in operators)
    rows = [("matrix products", sum(each.calls for each in products), sum(each.self_ms for each in products))]
    rows += [(f"`{each.name}`", each.calls, each.self_ms) for each in others[:9]]
    lines = ["| operator | calls | ms | of the step |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {calls} | {own_ms:,.0f} | {own_ms / total:.0%} |" for name, calls, own_ms in rows]
    return "\n".join([*lines, "", f"The last step without the profiler took {ms:,.0f} ms."])


def profile_here(contestant: str, cell: Cell) -> list[Operator]:
    """Return the operators of a step, the costliest first."""
    with tempfile.TemporaryDirectory() as folder:
        step = partial(take_step, contestant, cell, 0)
        return profiling.profile_step(step, Path(folder) / "trace.json")


def main() -> None:
    """Measure every cell, print the table after each, and save all times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds per cell, after two warm-up rounds")
    parser.add_argument("--contestant", help="my_gpt.py:GPT, your network, or module:function")
    parser.add_argument("--output", default="experiments/runs/race.json", help="file for all times")
    arguments = parser.parse_args()
    contestants = [("ours", OURS, True), ("transformers", THEIRS, False), ("transformers, our allocator", THEIRS, True)]
    if arguments.contestant:
        contestants.append((arguments.contestant, arguments.contestant, False))
    results = []
    for cell in CELLS:
        results.append(race(cell, contestants, arguments.rounds))
        Path(arguments.output).write_text(json.dumps(results))
        print(table(results), flush=True)
    machine = environment.describe()
    heading = f"{arguments.rounds} rounds. {machine.device_name}, {machine.threads} threads, torch {machine.torch}."
    pages.put(pages.PERFORMANCE, "race", f"{heading}\n\n{table(results)}")
    pages.put(pages.PERFORMANCE, "profile", profile(OURS, Cell(2, 256, "bf16", compile=False)))


if __name__ == "__main__":
    main()
