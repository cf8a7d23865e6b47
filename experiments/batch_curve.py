"""Measure a level at growing batch sizes on a GPU: `PYTHONPATH=src:. python experiments/scaling.py --batch-curve`.

One process holds a network for each B; all share their weights. In each round every B takes its turn, in random order:
torch's cache is emptied, one step fills it again, and the next steps are timed. So the sizes before it change neither
the memory nor the time of a step. One B, the control, takes two turns in each round.
"""

import gc
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import altair as alt
import torch

from experiments.race import VOCAB_SIZE
from gpt2_ladder import files
from gpt2_ladder.config import MINIMUM_ROUNDS, Environment, Level
from gpt2_ladder.measuring import cost, gains, planning, summary, turns
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.params import Params
from gpt2_ladder.reporting import charts, tables
from gpt2_ladder.training import devices, loop, metrics, precisions, runtime

MIB, STEPS = 2**20, 3  # STEPS are timed in each turn
CONTROL = "control"


@dataclass(frozen=True)
class Plan:
    """What to measure. The rounds stop after `seconds` from the start, but not before MINIMUM_ROUNDS."""

    level: str
    rounds: int
    rehearsal: bool = False
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    control: int = 16
    block_size: int = 1024
    seconds: float = 200


@dataclass(frozen=True)
class Turn:
    """The steps of one B in one round: the median time, and the peaks of torch's allocator."""

    step_ms: float
    allocated_mib: float  # on a CPU, of the whole process
    reserved_mib: float | None  # with the cache; None on a CPU


def rehearse(level: str, rounds: int) -> Plan:
    """Return a small plan for a CPU."""
    return Plan(level, rounds, True, (1, 2, 4), 2, 64)


def predict(plan: Plan, params: Params, level: Level, device: torch.device) -> tuple[dict[int, planning.Step], int]:
    """Return the traced step of every B, and the largest B of `make plan` with the memory that is free."""
    network, operand = params.gpt(level), precisions.PRECISIONS[level.precision].operand
    cuda, free, T = devices.allocates_like_cuda(device), devices.free_memory(device), plan.block_size
    steps = {B: planning.trace_step(network, operand, B, T, cuda) for B in plan.batch_sizes}
    return steps, planning.largest_batch(network, operand, T, cuda, free)


def announce(plan: Plan, level: Level, steps: dict[int, planning.Step], largest: int, gpu: str, free: int) -> None:
    """Print what will run, what is predicted to fit, and how long it will take at least."""
    sizes = ", ".join(f"{B} ({step.peak_bytes / 2**30:,.1f})" for B, step in steps.items())
    rehearsal = "REHEARSAL. " if plan.rehearsal else ""
    print(f"{rehearsal}Level {plan.level}, T = {plan.block_size}, B (predicted GiB): {sizes}")
    print(f"{free / 2**30:,.1f} GiB are free; largest B of `make plan`: {largest or 'none'}")
    print(f"{plan.rounds} rounds of 1 + {STEPS} steps for each B, fewer after {plan.seconds:g} s in all", flush=True)
    every = [steps[B] for B in (*plan.batch_sizes, plan.control)]
    ms = [planning.least_ms(step, gpu, level.precision, level.compile) for step in every]
    if None not in ms:
        least = plan.rounds * (1 + STEPS) * sum(filter(None, ms)) / 1000
        print(
            f"By `make plan`'s bound these steps take at least {least:.0f} s; trying and compiling come on top",
            flush=True,
        )


def make_arms(plan: Plan, params: Params, level: Level, device: torch.device) -> Iterator[tuple[int, Arm]]:
    """Yield each B and its arm; the networks share weights and optimizer, but each is compiled for its own shape."""
    weights = turns.SharedWeights(params, device)
    for B in plan.batch_sizes:
        model, optimizer = weights.build(params.gpt(level), level.fused_adamw)
        if level.compile:
            runtime.compile_model(model)
        yield B, Arm(str(B), model, optimizer, level.precision, B, runtime.make_scaler(level.precision, device))


def draw_ids(plan: Plan, batch_size: int, seed: int, device: torch.device) -> loop.Batch:
    """Return random ids and targets, (batch_size, T) each, on `device`."""
    shape, generator = (2, batch_size, plan.block_size), torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB_SIZE, shape, generator=generator).to(device)
    return ids[0], ids[1]


def warm_up(arm: Arm, batch: loop.Batch, device: torch.device) -> float | None:
    """Take two steps, which compile the network. Return the second's milliseconds; None if memory does not suffice."""
    try:
        arm.step(batch, device)
        return arm.step(batch, device)
    except Exception as error:
        if not (devices.is_out_of_memory(error) or "out of memory" in str(error)):
            raise
    arm.optimizer.zero_grad()
    gc.collect()  # the error's traceback held the step's tensors
    devices.reset_peak_memory(device)
    return None


def take_turn(arm: Arm, batch: loop.Batch, device: torch.device) -> Turn:
    """Take one step that fills the emptied cache, and STEPS timed ones."""
    devices.reset_peak_memory(device)
    arm.step(batch, device)
    step_ms = median(turns.step_as_compiled(arm, batch, device) for _ in range(STEPS))
    reserved = torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else None
    return Turn(step_ms, devices.peak_memory_mib(device), reserved)


def measure(
    plan: Plan, arms: dict[str, Arm], device: torch.device, start: float
) -> Iterator[tuple[dict[str, Turn], float]]:
    """Yield each round: a turn of every arm, and the TFLOP/s of a bare matrix product."""
    generator, first = random.Random(1337), time.perf_counter()
    for index in range(plan.rounds):
        now = time.perf_counter()
        if index >= MINIMUM_ROUNDS and now - start + (now - first) / index > plan.seconds:
            return
        order = generator.sample(list(arms.items()), len(arms))
        result = {name: take_turn(arm, draw_ids(plan, arm.micro_batch, index, device), device) for name, arm in order}
        yield result, devices.matmul_tflops(next(iter(arms.values())).precision, device)


def describe(
    plan: Plan, params: Params, results: list[Turn], products: Sequence[float], peak: float | None, batch_size: int
) -> dict[str, Any]:
    """Return the rates and the memory of one batch size, from all its turns."""
    tokens, step_ms = batch_size * plan.block_size, [turn.step_ms for turn in results]
    rates = [cost.tflops(tokens * cost.flops_per_token(params.size, plan.block_size), ms) for ms in step_ms]
    reserved = [turn.reserved_mib for turn in results if turn.reserved_mib is not None]
    return {
        "step_ms": median(step_ms),
        "tokens_per_second": metrics.tokens_per_second(tokens, median(step_ms)),
        "mfu": summary.share(rates, [peak] * len(rates) if peak else None),
        "mfu_of_product": summary.share(rates, products),
        "allocated_mib": max(turn.allocated_mib for turn in results),
        "reserved_mib": max(reserved, default=None),
        "rounds_ms": step_ms,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        [
            "B",
            "ms",
            "tokens/s",
            "of the data sheet",
            "of its own product",
            "allocated MiB",
            "reserved MiB",
            "predicted MiB",
        ]
    ]
    for row in rows:
        cells = [f"{row['batch_size']}"]
        if row["fits"]:
            shares = [f"{row[key]:.1%}" if row[key] else "-" for key in ("mfu", "mfu_of_product")]
            cells += [f"{row['step_ms']:,.1f}", f"{row['tokens_per_second']:,.0f}", *shares]
            cells += [f"{row[key]:,.0f}" if row[key] else "-" for key in ("allocated_mib", "reserved_mib")]
        else:
            cells += ["does not fit", *["-"] * 5]
        lines.append([*cells, f"{row['predicted_mib']:,.0f}"])
    return tables.markdown_table(lines, text_columns=1)


def draw(report: dict[str, Any], path: Path) -> None:
    """Save the picture: tokens/s, the shares of the peaks, and memory against B."""
    sizes, largest = [row["batch_size"] for row in report["rows"]], report["largest_planned"]
    x = alt.X("B:Q", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=sizes))
    marks = [{"B": largest}] if sizes[0] <= largest <= 2 * sizes[-1] else []  # farther ones would squeeze the curve
    rule = alt.Chart(alt.Data(values=marks)).mark_rule(strokeDash=[4, 4]).encode(x)
    panels = []
    for title, keys in {
        "tokens/s": {"tokens_per_second": (1, "tokens/s")},
        "share": {"mfu": (1, "of the data sheet"), "mfu_of_product": (1, "of its own product")},
        "GiB": {
            "predicted_mib": (1024, "predicted"),
            "reserved_mib": (1024, "reserved"),
            "allocated_mib": (1024, "allocated"),
        },
    }.items():
        points = [
            {"B": row["batch_size"], "y": row[key] / unit, "what": what}
            for key, (unit, what) in keys.items()
            for row in report["rows"]
            if row.get(key)
        ]
        color = alt.Color("what:N", legend=alt.Legend(title=None, orient="bottom", columns=1), sort=None)
        lines = alt.Chart(alt.Data(values=points)).mark_line(point=True)
        panels.append((lines.encode(x, alt.Y("y:Q", title=title), color) + rule).properties(width=230, height=200))
    heading = alt.Title(report["title"], subtitle=f"dashed: largest B of make plan, {largest or 'none'}")
    chart = alt.hconcat(*panels, title=heading).resolve_scale(color="independent")
    charts.save_png(chart, path)


def try_all(plan: Plan, params: Params, level: Level, device: torch.device) -> dict[str, Arm]:
    """Return the arms of all B that fit, compiled, by name; the control is the arm of one of them."""
    arms: dict[str, Arm] = {}
    for B, arm in make_arms(plan, params, level, device):
        start, ms = time.perf_counter(), warm_up(arm, draw_ids(plan, B, 0, device), device)
        result = "does not fit" if ms is None else f"{ms:,.1f} ms a step"
        print(f"B = {B}: {result}, compiled and tried in {time.perf_counter() - start:.0f} s", flush=True)
        if ms is not None:
            arms[str(B)] = arm
    return {**arms, CONTROL: arms[str(plan.control)]} if str(plan.control) in arms else arms


def run(plan: Plan, params: Params, environment: Environment, folder: Path) -> dict[str, Any]:
    """Measure, print, and write the JSON and the picture into `folder`; return the content of the JSON."""
    start, level = time.perf_counter(), params.levels[plan.level]
    device = devices.open_device(environment.device, environment.threads, params.seed, deterministic=False)
    steps, largest = predict(plan, params, level, device)
    announce(plan, level, steps, largest, environment.device_name, devices.free_memory(device))
    arms = try_all(plan, params, level, device)
    if not arms:
        raise SystemExit(f"error: not even B = {plan.batch_sizes[0]} fits: free memory on the GPU")
    rounds, products = zip(*measure(plan, arms, device, start), strict=True)
    results = {name: [round_[name] for round_ in rounds] for name in arms}
    peak = cost.KNOWN_PEAKS.get(environment.device_name, {}).get(level.precision)
    rows: list[dict[str, Any]] = []
    for B in plan.batch_sizes:
        rows.append({"batch_size": B, "fits": str(B) in arms, "predicted_mib": steps[B].peak_bytes / MIB})
        if str(B) in arms:
            rows[-1] |= describe(plan, params, results[str(B)], products, peak, B)
    times = [[turn.step_ms for turn in results.get(name, ())] for name in (CONTROL, str(plan.control))]
    rehearsal = "rehearsal: " if plan.rehearsal else ""
    report = {
        "title": f"{rehearsal}{environment.device_name}, {params.model}, level {plan.level}, T = {plan.block_size}",
        **{"plan": asdict(plan), "environment": environment.model_dump(), "largest_planned": largest},
        **{"product_tflops": median(products), "rounds": len(rounds)},
        "control": str(gains.gain(*times)) if CONTROL in arms else None,
        "rows": rows,
    }
    path = folder / f"batch-curve{'-rehearsal' if plan.rehearsal else ''}.json"
    files.write_json(path, report)
    draw(report, path.with_suffix(".png"))
    print(
        f"\n{report['title']}\n\n{table(rows)}\n\nLargest B of `make plan`: {largest or 'none'}. {len(rounds)} rounds."
    )
    print(f"B = {plan.control} against itself: {report['control']}. {time.perf_counter() - start:.0f} s. Wrote {path}")
    return report
