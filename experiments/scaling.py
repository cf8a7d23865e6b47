"""Tokens/s and memory against B*T, threads, depth and width. `PYTHONPATH=src:. python experiments/scaling.py`.

Every point is a process of its own, which takes one step in turn with the others of its row of pictures, in an order
drawn anew for each round, and with GPT-2 124M at B=2, T=256 on all threads, by whose rate it is divided.
"""

import argparse
import random
import resource
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import altair as alt
import torch

from experiments import pages
from experiments.race import LEARNING_RATE, SETTINGS, VOCAB_SIZE
from gpt2_ladder.config import GPTConfig, Size
from gpt2_ladder.measuring import cost, gains
from gpt2_ladder.model import GPT
from gpt2_ladder.reporting import charts
from gpt2_ladder.training import devices, loop, runtime
from pipeline import environment

CPU = torch.device("cpu")
PICTURE = Path("docs/scaling.png")


@dataclass(frozen=True)
class Point:
    """What is trained: bf16, flash, fused AdamW, not compiled, memory kept; heads of 64 channels."""

    tokens: int  # B * T, T = 256 but where that is too much
    threads: int
    n_layer: int = 12
    n_embd: int = 768

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        block_size = min(256, self.tokens)
        return self.tokens // block_size, block_size

    @property
    def size(self) -> Size:
        """The network's."""
        return Size(n_layer=self.n_layer, n_head=self.n_embd // 64, n_embd=self.n_embd, n_positions=1024)


def families(here: Point) -> dict[str, list[Point]]:
    """Return the points to measure, by the field that changes; `here` is in each."""
    values = {
        "tokens": (64, 256, 512, 1024, 2048),
        "threads": tuple(range(1, here.threads + 1)),
        "n_layer": (3, 6, 12, 24),
        "n_embd": (384, 768, 1024),
    }
    return {field: [replace(here, **{field: value}) for value in values[field]] for field in values}


@cache
def build(point: Point) -> tuple[GPT, torch.optim.Optimizer]:
    """Return network and optimizer of `point` in this process, which is its own; once."""
    torch.set_num_threads(point.threads)
    devices.keep_freed_memory(CPU)
    model = GPT(GPTConfig(**point.size.model_dump(), attention="flash"))
    return model, loop.make_optimizer(model, LEARNING_RATE, SETTINGS, fused=True)


def take_step(point: Point, index: int) -> float:
    """Train on batch `index` in the process of `point`; return the milliseconds."""
    model, optimizer = build(point)
    autocast = runtime.set_precision("bf16", CPU)
    ids = torch.randint(VOCAB_SIZE, (2, *point.shape), generator=torch.Generator().manual_seed(index))
    return loop.train_step(model, optimizer, (ids[0], ids[1]), autocast, CPU, point.shape[0])[1]


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(
    points: list[Point], rounds: int, warm_up: int
) -> tuple[Mapping[Point, list[float]], Mapping[Point, float]]:
    """Return the milliseconds of every point by round, and its peak memory in MiB."""
    dice = random.Random(1337)
    step_ms: dict[Point, list[float]] = {point: [] for point in points}
    with ExitStack() as stack:
        processes = {point: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for point in points}
        for index in range(warm_up + rounds):
            for point in dice.sample(points, len(points)):
                ms = processes[point].submit(take_step, point, index).result()
                if index >= warm_up:
                    step_ms[point].append(ms)
        return step_ms, {point: processes[point].submit(peak_mib).result() for point in points}


def describe(field: str, point: Point, here: Point, ms: list[float], own_ms: list[float], mib: float) -> dict[str, Any]:
    """Return the row of `point`: what it is, its rate, that over `here`'s in the same rounds, and its memory."""
    scale = point.tokens / here.tokens
    rates = [cost.tflops(point.tokens * cost.flops_per_token(point.size, point.shape[1]), one) for one in ms]
    return {
        "field": field,
        "value": getattr(point, field),
        **asdict(point),
        "tokens_per_second": point.tokens / statistics.median(ms) * 1000,
        "over_here": str(gains.gain([one * scale for one in own_ms], ms)) if point != here else "",
        "tflops": statistics.median(rates),
        "gib": mib / 2**10,
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Write the picture: a column for each field, tokens/s above and GiB below."""
    titles = {"tokens": "B * T", "threads": "threads", "n_layer": "n_layer", "n_embd": "n_embd"}
    columns = []
    for field, title in titles.items():
        own = alt.Chart(alt.Data(values=[row for row in rows if row["field"] == field])).mark_line(point=True)
        x = alt.X("value:Q", title=title, scale=alt.Scale(zero=True))
        panels = [
            own.encode(x, alt.Y(f"{name}:Q", title=text)).properties(width=150, height=120)
            for name, text in (("tokens_per_second", "tokens/s"), ("gib", "GiB"))
        ]
        columns.append(alt.vconcat(*panels))
    charts.save_png(alt.hconcat(*columns), PICTURE)


def main() -> None:
    """Measure family by family, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="of every family, after five in which the heap settles")
    rounds = parser.parse_args().rounds
    machine = environment.describe()
    here, rows = Point(512, machine.threads), []
    for field, points in families(here).items():
        step_ms, peaks = measure(points, rounds, warm_up=5)
        rows += [describe(field, one, here, step_ms[one], step_ms[here], peaks[one]) for one in points]
        print(*rows[-len(points) :], sep="\n", flush=True)
    lines = ["| B x T | threads | n_layer | n_embd | tokens/s | over 2 x 256, all threads, 124M | TFLOP/s | GiB |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        point = Point(*(row[name] for name in ("tokens", "threads", "n_layer", "n_embd")))
        cells = [f"{row['tokens_per_second']:,.0f}", row["over_here"], f"{row['tflops']:.2f}", f"{row['gib']:.1f}"]
        cells = ["{} x {}".format(*point.shape), str(point.threads), str(point.n_layer), str(point.n_embd), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{rounds} rounds. {machine.device_name}, {machine.threads} threads, torch {machine.torch}."]
    pages.put(pages.PERFORMANCE, "scaling", "\n".join(lines))
    draw(rows)


if __name__ == "__main__":
    main()
