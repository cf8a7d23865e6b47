"""Race a step of ours against transformers' GPT-2, or any other contestant, a process each, one step in turn.

`PYTHONPATH=src:. python benchmarks/race.py` takes every cell of CELLS; `--contestant module:function` adds another one:
a function (cell) -> step, where step takes ids and targets, int64 (B, T) each, trains on them, from zero_grad to the
optimizer's step, and returns the loss.
"""

import argparse
import ctypes
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from gpt2_ladder import cost, gains
from gpt2_ladder.config import Size

Step = Callable[..., float]
OURS, THEIRS = "benchmarks.race:ours", "benchmarks.race:transformers"
SHAPES = ((2, 256), (4, 64))
SIZE = Size(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
VOCAB_SIZE, LEARNING_RATE = 50257, 3e-4


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
    """Return the step of this project's GPT with flash attention and fused AdamW."""
    import torch

    from gpt2_ladder import runtime, training
    from gpt2_ladder.config import GPTConfig
    from gpt2_ladder.model import GPT

    model, device = GPT(GPTConfig(**SIZE.model_dump(), attention="flash")), torch.device("cpu")
    if cell.compile:
        runtime.compile_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    autocast = runtime.set_precision(cell.precision, device)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        return training.train_step(model, optimizer, (x, y), autocast, device, cell.batch_size)[0].item()

    return step


def transformers(cell: Cell) -> Step:
    """Return the step of a plain loop around transformers' GPT2LMHeadModel, without dropout, with fused AdamW."""
    import torch
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


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step, instead of handing it to the kernel; before torch allocates."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch asks for huge pages
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        sys.exit("error: mallopt refuses")


def drive(contestant: str, cell: Cell) -> None:
    """Be a contestant's process: train one step for every line that comes in, and print how long it took."""
    if cell.keep_memory:
        keep_freed_memory()
    import torch

    from gpt2_ladder import devices
    from pipeline import environment

    torch.set_num_threads(environment.describe().threads)
    module, function = contestant.split(":")
    step = getattr(importlib.import_module(module), function)(cell)
    dice = torch.Generator().manual_seed(1)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "peak":
            answer = {"tflops": devices.matmul_tflops(cell.precision, torch.device("cpu"))}
        else:
            ids = torch.randint(VOCAB_SIZE, (cell.batch_size, cell.block_size + 1), generator=dice)
            x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            start = time.perf_counter()
            loss = step(x, y)
            answer = {"ms": (time.perf_counter() - start) * 1000, "loss": loss}
        print(json.dumps(answer), flush=True)


class Contestant:
    """A process that waits for its turn."""

    def __init__(self, name: str, function: str, cell: Cell):
        self.name = name
        command = [sys.executable, "-c", DRIVER, function, json.dumps(asdict(cell))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Contestant":
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes

    def ask(self, what: str) -> dict[str, float]:
        """Have it take a step, or multiply two matrices at its peak."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        while not (line := self._process.stdout.readline()).startswith(("{", "ready")):
            if not line:
                sys.exit(f"error: contestant {self.name} ended with exit code {self._process.wait()}")
        return line


DRIVER = (
    "import json, sys; from benchmarks.race import Cell, drive; drive(sys.argv[1], Cell(**json.loads(sys.argv[2])))"
)


def race(cell: Cell, contestants: Sequence[tuple[str, str, bool]], rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Return every contestant's milliseconds by round, and the peak of a bare matrix product in the same rounds."""
    dice = random.Random(1337)
    with ExitStack() as stack:
        runners = [
            stack.enter_context(Contestant(name, function, replace(cell, keep_memory=keep)))
            for name, function, keep in contestants
        ]
        step_ms: dict[str, list[float]] = {runner.name: [] for runner in runners}
        losses: dict[str, float] = {}
        peaks = []
        for index in range(-warm_up, rounds):
            for runner in dice.sample(runners, len(runners)):
                answer = runner.ask("step")
                losses.setdefault(runner.name, answer["loss"])
                if index >= 0:
                    step_ms[runner.name].append(answer["ms"])
            if index >= 0:
                peaks.append(runners[0].ask("peak")["tflops"])
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


def main() -> None:
    """Race in every cell, print the table as it grows, and keep the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="in every cell, after two to warm up")
    parser.add_argument("--contestant", help="module:function of one more")
    parser.add_argument("--output", default="benchmarks/runs/race.json", help="where all times go")
    arguments = parser.parse_args()
    contestants = [("ours", OURS, True), ("transformers", THEIRS, False), ("transformers, our allocator", THEIRS, True)]
    if arguments.contestant:
        contestants.append((arguments.contestant, arguments.contestant, False))
    found = []
    for cell in CELLS:
        found.append(race(cell, contestants, arguments.rounds))
        Path(arguments.output).write_text(json.dumps(found))
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
