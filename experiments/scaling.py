"""Measure tokens/s and memory against B*T, threads, depth and width: `PYTHONPATH=src:. python experiments/scaling.py`.

Every point has its own process. The points of one family take steps in turn, in a random order for each round, together
with the reference, GPT-2 124M at B=2, T=256 on all threads.

`--batch-curve` measures growing batch sizes on a GPU instead: see experiments/batch_curve.py.
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

from experiments import batch_curve, pages
from experiments.race import LEARNING_RATE, SETTINGS, VOCAB_SIZE
from gpt2_ladder import params_yaml
from gpt2_ladder.config import MINIMUM_ROUNDS, GPTConfig, Size
from gpt2_ladder.measuring import cost, gains
from gpt2_ladder.model import GPT
from gpt2_ladder.reporting import charts
from gpt2_ladder.training import capabilities, devices, loop, runtime
from pipeline import environment

CPU = torch.device("cpu")
PICTURE = Path("docs/scaling.png")


@dataclass(frozen=True)
class Point:
    """A training with bf16, flash, fused AdamW and kept memory, not compiled; heads have 64 channels."""

    tokens: int  # B * T, with T = 256 or fewer
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
        """The size of the network."""
        return Size(n_layer=self.n_layer, n_head=self.n_embd // 64, n_embd=self.n_embd, n_positions=1024)


def families(reference: Point) -> dict[str, list[Point]]:
    """Return the points to measure, by the field that changes; `reference` is in each family."""
    values = {
        "tokens": (64, 256, 512, 1024, 2048),
        "threads": tuple(range(1, reference.threads + 1)),
        "n_layer": (3, 6, 12, 24),
        "n_embd": (384, 768, 1024),
    }
    return {field: [replace(reference, **{field: value}) for value in values[field]] for field in values}


@cache
def build(point: Point) -> tuple[GPT, torch.optim.Optimizer]:
    """Build the network and optimizer of `point` once in its process."""
    torch.set_num_threads(point.threads)
    devices.keep_freed_memory(CPU)
    model = GPT(GPTConfig(**point.size.model_dump(), attention="flash"))
    return model, loop.make_optimizer(model, LEARNING_RATE, SETTINGS, fused=True)


def take_step(point: Point, index: int) -> float:
    """Train on batch `index` in the process of `point`; return the milliseconds."""
    model, optimizer = build(point)
    autocast = runtime.set_precision("bf16", CPU)
    ids = torch.randint(VOCAB_SIZE, (2, *point.shape), generator=torch.Generator().manual_seed(index))
    return loop.timed_step(model, optimizer, (ids[0], ids[1]), autocast, CPU, point.shape[0])


def peak_mib() -> float:
    """Return the peak memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(
    points: list[Point], rounds: int, warm_up: int
) -> tuple[Mapping[Point, list[float]], Mapping[Point, float]]:
    """Return the milliseconds of every point by round, and its peak memory in MiB."""
    generator = random.Random(1337)
    step_ms: dict[Point, list[float]] = {point: [] for point in points}
    with ExitStack() as stack:
        processes = {point: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for point in points}
        for index in range(warm_up + rounds):
            for point in generator.sample(points, len(points)):
                ms = processes[point].submit(take_step, point, index).result()
                if index >= warm_up:
                    step_ms[point].append(ms)
        return step_ms, {point: processes[point].submit(peak_mib).result() for point in points}


def describe(
    field: str, point: Point, reference: Point, ms: list[float], reference_ms: list[float], mib: float
) -> dict[str, Any]:
    """Return the row of `point`: its fields, its rate alone and over the reference's, and its memory."""
    scale = point.tokens / reference.tokens
    flops = point.tokens * cost.flops_per_token(point.size, point.shape[1])
    return {
        "field": field,
        "value": getattr(point, field),
        **asdict(point),
        "tokens_per_second": point.tokens / statistics.median(ms) * 1000,
        "gain": str(gains.gain([scale * step_ms for step_ms in reference_ms], ms)) if point != reference else "",
        "tflops": statistics.median(cost.tflops(flops, step_ms) for step_ms in ms),
        "gib": mib / 2**10,
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Save the picture: a column for each field, tokens/s above and GiB below."""
    titles = {"tokens": "B * T", "threads": "threads", "n_layer": "n_layer", "n_embd": "n_embd"}
    columns = []
    for field, title in titles.items():
        lines = alt.Chart(alt.Data(values=[row for row in rows if row["field"] == field])).mark_line(point=True)
        x = alt.X("value:Q", title=title, scale=alt.Scale(zero=True))
        panels = [
            lines.encode(x, alt.Y(f"{name}:Q", title=text)).properties(width=150, height=120)
            for name, text in (("tokens_per_second", "tokens/s"), ("gib", "GiB"))
        ]
        columns.append(alt.vconcat(*panels))
    charts.save_png(alt.hconcat(*columns), PICTURE)


def parse() -> argparse.Namespace:
    """Read the arguments; exit if they do not fit together, to this machine or to params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds per family, after five of warm-up")
    parser.add_argument("--batch-curve", action="store_true", help="measure B = 4 to 128 on one NVIDIA GPU instead")
    parser.add_argument("--level", default="fused", help="the level of the batch curve (default: fused)")
    parser.add_argument("--rehearse", action="store_true", help="try the batch curve with the tiny model, on a CPU too")
    parser.add_argument(
        "--folder", type=Path, default=Path("experiments/runs"), help="for the JSON and the picture of the batch curve"
    )
    args = parser.parse_args()
    if args.rounds < MINIMUM_ROUNDS:
        parser.error(f"--rounds {args.rounds}: too few for an interval; use at least {MINIMUM_ROUNDS}")
    if args.rehearse and not args.batch_curve:
        parser.error("--rehearse is for --batch-curve: add it")
    if not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: there is no such folder; create it or name another")
    return args


def measure_batch_curve(level: str, rounds: int, rehearsal: bool, folder: Path) -> None:
    """Measure the batch curve of `level`. Exit if this machine has no GPU, unless `rehearsal`, or has no such level."""
    params, machine = params_yaml.load(), environment.describe()
    speed = [name for name, row in params.levels.items() if row.group == "speed"]
    if level not in speed:
        raise SystemExit(f"error: --level {level}: no such speed level; choose from {', '.join(speed)}")
    if machine.device != "cuda" and not rehearsal:
        raise SystemExit(f"error: --batch-curve needs an NVIDIA GPU, but this is {machine.device_name}; add --rehearse")
    if reason := capabilities.why_skipped(params.levels[level], machine, run_slow_levels=True):
        raise SystemExit(f"error: --level {level}: {reason}; choose another level")
    plan = batch_curve.rehearse(level, rounds) if rehearsal else batch_curve.Plan(level, rounds)
    model = {"model": "tiny"} if rehearsal else {}
    batch_curve.run(plan, params.model_copy(update=model), machine, folder)


def measure_families(rounds: int) -> None:
    """Measure all families and write the table and the picture."""
    machine = environment.describe()
    reference, rows = Point(512, machine.threads), []
    for field, points in families(reference).items():
        step_ms, peaks = measure(points, rounds, warm_up=5)
        reference_ms = step_ms[reference]
        rows += [describe(field, point, reference, step_ms[point], reference_ms, peaks[point]) for point in points]
        print(*rows[-len(points) :], sep="\n", flush=True)
    lines = ["| B x T | threads | n_layer | n_embd | tokens/s | over 2 x 256, all threads, 124M | TFLOP/s | GiB |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        point = Point(*(row[name] for name in ("tokens", "threads", "n_layer", "n_embd")))
        cells = [f"{row['tokens_per_second']:,.0f}", row["gain"], f"{row['tflops']:.2f}", f"{row['gib']:.1f}"]
        cells = ["{} x {}".format(*point.shape), str(point.threads), str(point.n_layer), str(point.n_embd), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{rounds} rounds. {machine.device_name}, {machine.threads} threads, torch {machine.torch}."]
    pages.put(pages.PERFORMANCE, "scaling", "\n".join(lines))
    draw(rows)


def main() -> None:
    """Measure the batch curve on a GPU, or all families on a CPU."""
    args = parse()
    if args.batch_curve:
        measure_batch_curve(args.level, args.rounds, args.rehearse, args.folder)
    else:
        measure_families(args.rounds)


if __name__ == "__main__":
    main()
