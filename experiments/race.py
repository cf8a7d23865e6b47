"""Race a step of ours against transformers' GPT-2, or any other contestant, a process each, one step in turn.

`PYTHONPATH=src:. python experiments/race.py` takes every cell of CELLS and writes its part of docs/PERFORMANCE.md;
`--contestant module:function` adds another one: a function (cell) -> step, where step takes ids and targets, int64
(B, T) each, trains on them, from zero_grad to the optimizer's step, and returns the loss.
"""

import argparse
import importlib
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
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from experiments import pages
from gpt2_ladder.config import AdamW, Size
from gpt2_ladder.measuring import cost, gains, profiling
from gpt2_ladder.measuring.profiling import Operator
from gpt2_ladder.training import devices
from pipeline import environment

Step = Callable[..., float]
OURS, THEIRS = "benchmarks.race:ours", "benchmarks.race:transformers"
SHAPES = ((2, 256), (4, 64))
SIZE = Size(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
VOCAB_SIZE, LEARNING_RATE = 50257, 3e-4
SETTINGS = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)  # torch's own


@dataclass(frozen=True)
class Cell:
    """One setting of the race: shape, "fp32" or "bf16", compiled or not, and whether glibc keeps freed memory."""

    batch_size: int
    block_size: int
    precision: str
    compile: bool
    keep_memory: bool = True


CELLS = [
    Cell(*shape, precision, compiled) for shape, precision, compiled in product(SHAPES, ("fp32", "bf16"), (False, True))
]


def ours(cell: Cell) -> Step:
    """Return the step of this project's GPT with fused AdamW and written-out attention, at these T the faster one."""
    from gpt2_ladder.config import GPTConfig
    from gpt2_ladder.model import GPT
    from gpt2_ladder.training import loop, runtime

    model, device = GPT(GPTConfig(**SIZE.model_dump(), attention="eager")), torch.device("cpu")
    if cell.compile:
        runtime.compile_model(model)
    optimizer = loop.make_optimizer(model, LEARNING_RATE, SETTINGS, fused=True)
    autocast = runtime.set_precision(cell.precision, device)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        return loop.train_step(model, optimizer, (x, y), autocast, device, cell.batch_size)[0].item()

    return step


def transformers(cell: Cell) -> Step:
    """Return the step of a plain loop around transformers' GPT2LMHeadModel, without dropout, with fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    if cell.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=cell.precision == "bf16")

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        optimizer.zero_grad()
        with autocast:
            loss = model(x, labels=y, shift_labels=y).loss  # y is shifted already
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@cache
def open_contestant(contestant: str, cell: Cell) -> Step:
    """Return the step of `contestant`, module:function, in this process, which is its own; once."""
    torch.set_num_threads(environment.describe().threads)
    if cell.keep_memory:
        devices.keep_freed_memory(torch.device("cpu"))
    module, function = contestant.split(":")
    return getattr(importlib.import_module(module), function)(cell)


def take_step(contestant: str, cell: Cell, index: int) -> tuple[float, float]:
    """Take a step of `contestant` on batch `index` in its process; return the milliseconds and the loss."""
    step, dice = open_contestant(contestant, cell), torch.Generator().manual_seed(index)
    ids = torch.randint(VOCAB_SIZE, (cell.batch_size, cell.block_size + 1), generator=dice)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    start = time.perf_counter()
    loss = step(x, y)
    return (time.perf_counter() - start) * 1000, loss


def peak_tflops(precision: str) -> float:
    """Return what a bare matrix product reaches now, in TFLOP/s."""
    return devices.matmul_tflops(precision, torch.device("cpu"))


def race(cell: Cell, contestants: Sequence[tuple[str, str, bool]], rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Return every contestant's milliseconds by round, and the peak of a bare matrix product in the same rounds."""
    dice = random.Random(1337)
    step_ms: dict[str, list[float]] = {name: [] for name, _, _ in contestants}
    losses: dict[str, float] = {}
    peaks = []
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name, _, _ in contestants
        }
        for index in range(-warm_up, rounds):
            for name, function, keep in dice.sample(contestants, len(contestants)):
                own = replace(cell, keep_memory=keep)
                ms, loss = processes[name].submit(take_step, function, own, warm_up + index).result()
                losses.setdefault(name, loss)
                if index >= 0:
                    step_ms[name].append(ms)
            if index >= 0:
                peaks.append(processes[contestants[0][0]].submit(peak_tflops, cell.precision).result())
    return {"cell": asdict(cell), "step_ms": step_ms, "first_losses": losses, "peak_tflops": peaks}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of all cells."""
    others = [name for name in found[0]["step_ms"] if name != "ours"]
    titles = ["B x T", "precision", "compiled", "ours ms", *(f"over {name}" for name in others), "of the peak"]
    rows = [titles, ["---"] * 3 + ["---:"] * (len(titles) - 3)]
    for one in found:
        cell, times = Cell(**one["cell"]), one["step_ms"]
        flops = cell.batch_size * cell.block_size * cost.flops_per_token(SIZE, cell.block_size)
        shares = [cost.tflops(flops, ms) / peak for ms, peak in zip(times["ours"], one["peak_tflops"], strict=True)]
        gained = [str(gains.gain(times[name], times["ours"])) for name in others]
        rows.append(
            [
                f"{cell.batch_size} x {cell.block_size}",
                cell.precision,
                "yes" if cell.compile else "no",
                f"{statistics.median(times['ours']):,.0f}",
                *gained,
                f"{statistics.median(shares):.0%}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def profile(contestant: str, cell: Cell) -> str:
    """Return the Markdown table of where a step's time goes, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        for index in range(8):  # in which the allocator finds its shape
            ms, _ = process.submit(take_step, contestant, cell, index).result()
        operators = process.submit(profile_here, contestant, cell).result()
    products = [one for one in operators if one.name in ("aten::mm", "aten::addmm", "aten::bmm")]
    total = sum(one.self_ms for one in operators)
    rows = [("matrix products", sum(one.calls for one in products), sum(one.self_ms for one in products))]
    rows += [(f"`{one.name}`", one.calls, one.self_ms) for one in operators if one not in products][:9]
    lines = ["| operator | calls | ms | of the step |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {calls} | {own_ms:,.0f} | {own_ms / total:.0%} |" for name, calls, own_ms in rows]
    return "\n".join([*lines, "", f"The last step without the profiler took {ms:,.0f} ms."])


def profile_here(contestant: str, cell: Cell) -> list[Operator]:
    """Return the operators of a step, the costliest first."""
    with tempfile.TemporaryDirectory() as folder:
        step = partial(take_step, contestant, cell, 0)
        return profiling.profile_step(step, [ProfilerActivity.CPU], Path(folder) / "trace.json")


def main() -> None:
    """Race in every cell, print the table as it grows, and keep the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="in every cell, after two to warm up")
    parser.add_argument("--contestant", help="module:function of one more")
    parser.add_argument("--output", default="experiments/runs/race.json", help="where all times go")
    arguments = parser.parse_args()
    contestants = [("ours", OURS, True), ("transformers", THEIRS, False), ("transformers, our allocator", THEIRS, True)]
    if arguments.contestant:
        contestants.append((arguments.contestant, arguments.contestant, False))
    found = []
    for cell in CELLS:
        found.append(race(cell, contestants, arguments.rounds))
        Path(arguments.output).write_text(json.dumps(found))
        print(table(found), flush=True)
    machine = environment.describe()
    heading = f"{arguments.rounds} rounds. {machine.device_name}, {machine.threads} threads, torch {machine.torch}."
    pages.put(pages.PERFORMANCE, "race", f"{heading}\n\n{table(found)}")
    pages.put(pages.PERFORMANCE, "profile", profile(OURS, Cell(2, 256, "bf16", compile=False)))


if __name__ == "__main__":
    main()
