"""Measure what each switch gains when it comes first, and when it comes last, in a folder where `dvc repro` has run.

`PYTHONPATH=src:. python -m experiments.attribution run NAME.json` measures this machine and writes
experiments/attribution/NAME.json. NAME is that of the machine's file in machines/, if it has one.
`PYTHONPATH=src:. python -m experiments.attribution write` writes docs/attribution.md and its pictures from these files.
"""

import gc
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Self

import altair as alt
import numpy as np
import torch
from pydantic import ValidationError, model_validator

from experiments import pages
from gpt2_ladder import files
from gpt2_ladder.config import BASELINE, CONTROL, MINIMUM_ROUNDS, Environment, Strict, Switches, UserError
from gpt2_ladder.measuring import gains, turns
from gpt2_ladder.measuring.gains import Gain, Round
from gpt2_ladder.params import Params
from gpt2_ladder.reporting import charts, gallery, tables
from gpt2_ladder.training import capabilities, data, devices
from pipeline import PROBE, TRAIN_SHARD, Parser, read_settings, run

FOLDER, PAGE, PICTURES = map(Path, ("experiments/attribution", "docs/attribution.md", "docs/attribution"))
FULL = "full"  # the arm with all switches that are measured
NEEDS = {"autotune": "compile", "cuda_graphs": "compile"}
INTERACTIONS = (("compile", "flash"), ("bf16", "compile"), ("compile", "padded"))
MOST_ARMS = 10  # in a block: all its networks are in memory, compiled
ROUNDS, COMPILE_S = 12, 2  # of a block, by default; seconds to compile a layer on two cores
COLORS = {"first": "#4c78a8", "last": "#d1495b"}


class Plan(Strict):
    """What is measured on a machine."""

    changes: dict[str, str]  # by switch, in the ladder's order: what it changes, as params.yaml has it
    left_out: dict[str, str]  # the reason, by switch
    arms: dict[str, Switches]  # BASELINE, FULL, those of INTERACTIONS, and all others


class Attribution(Strict):
    """The content of experiments/attribution/NAME.json."""

    model: str
    batch_size: int
    block_size: int
    environment: Environment
    plan: Plan
    blocks: list[list[Round]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        blocks = [[{*round_.step_ms} for round_ in block] for block in self.blocks]
        times = [step_ms for block in self.blocks for round_ in block for step_ms in round_.step_ms.values()]
        if min(map(len, blocks), default=0) < MINIMUM_ROUNDS or min(times, default=0) <= 0:
            raise ValueError(f"every block needs {MINIMUM_ROUNDS} rounds with positive times")
        whole = all({BASELINE, FULL} <= arms == block[0] for block in blocks for arms in block)
        if not whole or {arm for block in blocks for arm in block[0]} != self.plan.arms.keys():
            raise ValueError(f"every round of a block needs {BASELINE}, {FULL} and the same other arms of the plan")
        return self

    def times(self, *arms: str) -> list[np.ndarray]:
        """Return the milliseconds of each of `arms`, (rounds,), in the first block that has them all."""
        rounds = next(block for block in self.blocks if {*arms} <= block[0].step_ms.keys())
        return [np.array([round_.step_ms[arm] for round_ in rounds]) for arm in arms]

    def gain(self, arm: str, over: str) -> Gain | None:
        """Return the gain of `arm` over the arm `over`, or None if one of them is not in the plan."""
        return gains.gain(*self.times(over, arm)) if {arm, over} <= self.plan.arms.keys() else None

    def switches(self) -> dict[str, dict[str, Gain | None]]:
        """Return the gains of every switch that is measured, "first" and "last"."""
        return {
            name: {"first": self.gain(f"first {name}", BASELINE), "last": self.gain(FULL, f"last {name}")}
            for name in self.plan.changes
            if name not in self.plan.left_out
        }

    def interactions(self) -> dict[tuple[str, str], Gain]:
        """Return the gain of each pair over the product of both gains alone; above 1, they gain more together."""
        pairs = [pair for pair in INTERACTIONS if " + ".join(pair) in self.plan.arms]
        times = {(a, b): self.times(BASELINE, f"first {a}", f"first {b}", f"{a} + {b}") for a, b in pairs}
        return {pair: gains.gain(a * b, base * both) for pair, (base, a, b, both) in times.items()}


def make_plan(params: Params, environment: Environment, micro_batches: int) -> Plan:
    """Return the arms of this machine: each speed level adds a switch, and the last level has them all.

    Raise UserError if this machine cannot train the full set.
    """
    levels = {name: level for name, level in params.levels.items() if level.group == "speed"}
    rows = {name: Switches(**level.model_dump(exclude={"group"})) for name, level in levels.items()}
    base, full = rows[BASELINE], [*rows.values()][-1]
    texts, left_out, changes = dict[str, str](), dict[str, str](), dict[str, dict[str, Any]]()
    for above, name in pairwise(rows):
        change = {key: value for key, value in rows[name] if value != getattr(rows[above], key)}
        alone = base.model_copy(update=change)
        texts[name] = tables.switch_that_changes(alone, base)
        reasons = [*capabilities.without_effect(alone, environment, micro_batches).values()]
        if capabilities.needs_own_process(alone, environment):
            reasons = [f"`{texts[name]}` changes how the whole process, and so every arm, gets memory"]
        if reasons:
            left_out[name], full = "; ".join(reasons), without(full, change, base) or full
        else:
            changes[name] = change
    if reason := capabilities.why_skipped(full, environment, params.run_slow_levels):
        raise UserError(f"attribution: this machine cannot train the full set: {reason}")
    pairs = [pair for pair in INTERACTIONS if {*pair} <= changes.keys()]
    first = [name for name, change in changes.items() if not NEEDS.keys() & change.keys()]
    arms = {f"{a} + {b}": base.model_copy(update=changes[a] | changes[b]) for a, b in pairs}
    arms |= {f"first {name}": base.model_copy(update=changes[name]) for name in first} | {CONTROL: base}
    arms |= {f"last {name}": less for name, change in changes.items() if (less := without(full, change, base))}
    return Plan(changes=texts, left_out=left_out, arms={BASELINE: base, FULL: full, **arms})


def without(full: Switches, change: Mapping[str, Any], base: Switches) -> Switches | None:
    """Return `full` without `change` and without what needs it, or None if `full` does not have this change."""
    if any(getattr(full, key) != value for key, value in change.items()):
        return None
    dropped = [*change, *(key for key, needed in NEEDS.items() if needed in change)]
    return full.model_copy(update={key: getattr(base, key) for key in dropped})


def make_blocks(arms: Sequence[str]) -> list[list[str]]:
    """Return `arms` in blocks of at most MOST_ARMS, with BASELINE and FULL in each."""
    shared, others, size = arms[:2], arms[2:], MOST_ARMS - 2
    return [[*shared, *others[start : start + size]] for start in range(0, len(others), size)]


def measure(path: Path, rounds: int) -> None:
    """Measure all blocks, one after the other, and write `path`. The arms of a block share their weights."""
    params, environment = read_settings()
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    shape, micro_batch = params.shape("speed"), files.read_json(PROBE)["micro_batch"]
    plan = make_plan(params, environment, math.ceil(shape.batch_size / micro_batch))
    batches = data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size)
    some, blocks = list(islice(batches, shape.steps)), make_blocks([*plan.arms])
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    arms = turns.build_arms(params, {BASELINE: plan.arms[BASELINE]}, device, micro_batch)
    step_s = [arms[0].step(some[0], device) / 1000 for _ in range(2)][1]
    compiled = params.size.n_layer * sum(switches.compile for switches in plan.arms.values())
    minutes = ((rounds + 2) * sum(map(len, blocks)) * step_s + compiled * COMPILE_S) / 60
    print(f"attribution: {len(plan.arms)} arms in {len(blocks)} blocks, {rounds} rounds, {step_s:.2f} s per", end=" ")
    print(f"{BASELINE} step: about {minutes:.0f} minutes, more if autotune is compiled for the first time", flush=True)
    measured: list[list[Round]] = [[] for _ in blocks]
    for number, (names, block) in enumerate(zip(blocks, measured, strict=True), start=1):
        arms.clear()  # the networks of the previous block and their graphs
        gc.collect()
        torch.compiler.reset()
        devices.reset_peak_memory(device)
        arms += turns.build_arms(params, {name: plan.arms[name] for name in names}, device, micro_batch)
        for name in turns.warm_up(arms, some[0], device, params.seed, plan.arms[FULL].cuda_graphs):
            print(f"attribution: block {number}, warming up {name}", flush=True)
        for result in turns.measure(arms, some, device, rounds, math.inf, params.seed):
            block.append(result)
            times = "  ".join(f"{name} {step_ms:,.0f}" for name, step_ms in result.step_ms.items())
            print(f"attribution: block {number}, round {len(block)}/{rounds}, ms per step: {times}", flush=True)
    about = {"model": params.model, "batch_size": shape.batch_size, "block_size": shape.block_size}
    report = Attribution(**about, environment=environment, plan=plan, blocks=measured)
    files.write_json(path, report.model_dump())
    print(part(path.stem, report))


def read(path: Path) -> Attribution:
    """Read a measurement. Raise UserError if it is none."""
    try:
        return Attribution.model_validate_json(path.read_text(errors="replace"))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "content"
        raise UserError(f"{path}: not a measurement: {place}: {error.errors()[0]['msg']}; measure again") from None


def title(name: str) -> str:
    """Return the machine's title in the gallery, or `name` if it has no file there."""
    return gallery.read(path).title if (path := gallery.FOLDER / f"{name}.json").exists() else name


def part(name: str, report: Attribution) -> str:
    """Return a machine's section of the page."""
    machine, noise = report.environment, gains.gain(*report.times(BASELINE, CONTROL))

    def cell(gain: Gain | None, otherwise: str = "") -> str:
        return str(gain) + "*" * (gains.verdict(gain, noise) == gains.NO_GAIN) if gain else otherwise

    rows = [["switch", "what changes", f"first, over `{BASELINE}`", "last, over the full set without it"]]
    for switch, row in report.switches().items():
        cells = cell(row["first"], "needs `compile`"), cell(row["last"], "not in the full set")
        rows.append([f"`{switch}`", f"`{report.plan.changes[switch]}`", *cells])
    pairs = [["together", "over the product of both alone"]]
    pairs += [[f"`{a}` and `{b}`", cell(gain)] for (a, b), gain in report.interactions().items()]
    blocks = [[[round_.step_ms[arm] for round_ in block] for arm in (BASELINE, FULL)] for block in report.blocks]
    text = (
        f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}. Model {report.model}, "
        f"{report.batch_size} x {report.block_size} tokens a step, {len(report.blocks[0])} rounds. The full set over "
        f"`{BASELINE}`, in each block: {', '.join(str(gains.gain(*times)) for times in blocks)}. The control: {noise}."
    )
    picture = f"![the gain of each switch on {title(name)}, first and last](attribution/{name}.svg)"
    left_out = "\n".join(f"- Not measured: {reason}." for reason in report.plan.left_out.values())
    parts = [f'<a id="{name}"></a>', f"## {title(name)}", picture, textwrap.fill(text, 120)]
    return "\n\n".join([*parts, tables.markdown_table(rows), tables.markdown_table(pairs, 1), left_out]).strip()


def draw(name: str, report: Attribution) -> str:
    """Return a dumbbell for each switch as an SVG: its gain first and last, with intervals."""
    gained = {switch: row.items() for switch, row in report.switches().items()}
    ends = [(switch, *end) for switch, row in gained.items() for end in row]
    rows = [{"switch": switch, "place": place, **vars(gain)} for switch, place, gain in ends if gain]
    offset = alt.YOffset("place:N", sort=[*COLORS], scale=alt.Scale(domain=[*COLORS], paddingOuter=1))
    base = alt.Chart(alt.Data(values=rows)).encode(alt.Y("switch:N", title=None, sort=[*gained]), offset)
    x = alt.X("ratio:Q", title="gain, with its 95 % interval", scale=alt.Scale(type="log", nice=False, padding=12))
    color = alt.Color("place:N", title=None, scale=alt.Scale(domain=[*COLORS], range=[*COLORS.values()]))
    lines = base.mark_line(color="#b8b8b8").encode(x, alt.Detail("switch:N"))
    intervals = base.mark_rule(strokeWidth=2).encode(alt.X("low:Q"), alt.X2("high:Q"), color)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(x, color)
    one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(strokeDash=[3, 3]).encode(alt.X("one:Q"))
    heading = f"GPT-2 ({report.model}) on {title(name)}, {report.batch_size} x {report.block_size} tokens a step"
    return charts.svg((one + lines + intervals + points).properties(width=440, height=alt.Step(14), title=heading))


def contents() -> dict[Path, str]:
    """Return the text of every file that `write` writes."""
    reports = {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}
    text = "\n\n".join(part(name, report) for name, report in reports.items()) or "Not measured yet on any machine."
    pictures = {PICTURES / f"{name}.svg": draw(name, report) for name, report in reports.items()}
    return {PAGE: pages.replace(PAGE, "measured", text), **pictures}


def main(*arguments: str) -> None:
    """Run one of the two commands."""
    parser = Parser(prog="python -m experiments.attribution", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure this machine")
    command.add_argument("file", metavar="NAME.json", help="its file in experiments/attribution")
    command.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="rounds of each block")
    commands.add_parser("write", help="write docs/attribution.md and its pictures")
    args = parser.parse_args(arguments)
    if args.command == "write":
        for path, text in contents().items():
            files.write(path, text)
    elif not re.fullmatch(r"[a-z0-9][a-z0-9-]*\.json", args.file):
        raise UserError(f"run {args.file}: give a name of small letters, digits and -, such as xeon-amx.json")
    elif args.rounds < MINIMUM_ROUNDS:
        raise UserError(f"--rounds {args.rounds}: too few for an interval; use at least {MINIMUM_ROUNDS}")
    else:
        measure(FOLDER / args.file, args.rounds)


if __name__ == "__main__":
    run(main)
