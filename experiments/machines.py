"""Write the numbers of machines/ into README.md and docs/: `make docs`.

Text between the comments `<!-- part -->` and `<!-- end of part -->` is replaced; docs/machines/ gets the pictures.
Every gain is a ratio within one machine. A machine measures only the levels that existed at its commit.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import pages
from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import BASELINE, NO_EFFECT
from gpt2_ladder.measuring import summary
from gpt2_ladder.measuring.gains import Gain
from gpt2_ladder.reporting import charts, facts, gallery, tables
from gpt2_ladder.reporting.gallery import Machine
from gpt2_ladder.training import capabilities

README, MACHINES, LEVELS, PICTURES = map(Path, ("README.md", "docs/machines.md", "docs/levels", "docs/machines"))
FIRST = "h100-sxm"  # the machine in the README's picture
IN_README = (FIRST, "xeon-amx", "epyc-avx512")
NOT_MEASURED, NOTHING = "not measured", "no effect"
NOISE = "*"  # marks a gain that noise may explain
REORDERED = "†"  # marks a level that was measured in the EARLIER order
OPERATORS = 4  # of a level and a machine, whose time changed most
REMARKS = {"chunked": " (slower, saves memory)"}
EARLIER = {"chunked": "fused", "allocator": "chunked"}  # level: the level before it, in climbs until 2026-11-27
PARAMS = params_yaml.load()
# those in params.yaml are of the reader's machine
OWN = {"peak_tflops": {}, "half": "auto"}
ROWS = {name: level for name, level in PARAMS.levels.items() if level.group == "speed"}
PREVIOUS = dict(zip(list(ROWS)[1:], ROWS, strict=False))


def milliseconds(value: float) -> str:
    """Format milliseconds with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def interval(value: Mapping[str, Any]) -> str:
    """Format an entry of gains.json, on one line of a table cell."""
    gain = str(Gain(value["ratio"], value["low"], value["high"])).replace(", ", ",\N{NO-BREAK SPACE}")
    return gain + (NOISE if value["verdict"] == facts.NO_GAIN else "")


FORMATS: dict[str, Callable[[Any], str]] = {
    "over_previous": interval,
    "over_baseline": interval,
    "step_ms": milliseconds,
    "mfu": "{:.0%}".format,
    "loss_difference": "{:.4f}".format,
    "val_loss": "{:.4f}".format,
}


@dataclass(frozen=True)
class Climb:
    """A machine of the gallery, and the summary of its rounds."""

    name: str
    machine: Machine

    @cached_property
    def gains(self) -> dict[str, Any]:
        """The content of a gains.json, for the levels of params.yaml that the machine measured."""
        benchmark = self.machine.benchmark
        known = benchmark.model_copy(update={"levels": [level for level in benchmark.levels if level in ROWS]})
        params = PARAMS.model_copy(update={"model": benchmark.model, **OWN})
        params = capabilities.with_half(params, benchmark.environment)
        return summary.summarize(params, params.levels, known)

    @property
    def fastest(self) -> str:
        """The level with the most tokens per second."""
        return max(self.gains["levels"], key=lambda level: self.gains["levels"][level]["tokens_per_second"])

    def cell(self, level: str, column: str) -> str:
        """Format one number of `level`; NOT_MEASURED if it is missing or over another level than here."""
        value = self.gains["levels"].get(level, {}).get(column)
        if value is None:
            value = getattr(self.machine.levels.get(level), column, None)
        if value is None and self.has_no_effect(level):
            return NOTHING
        if value is None or (column == "over_previous" and value["over"] != self.previous(level)):
            return NOT_MEASURED
        return FORMATS.get(column, "{:,.0f}".format)(value)

    def has_no_effect(self, level: str) -> bool:
        """Return whether the machine skipped `level` because its change has no effect there."""
        training = self.machine.levels.get(level, gallery.Training())
        return not training.losses and NO_EFFECT in (training.note or "")

    def is_earlier(self, level: str) -> bool:
        """Return whether the machine measured `level` in the EARLIER order, in which it also has a single cause."""
        over = self.gains["levels"].get(level, {}).get("over_previous") or {"over": None}
        return "allocator" in self.gains["levels"] and over["over"] == EARLIER.get(level, "")

    def previous(self, level: str) -> str:
        """Return the level above `level` in params.yaml, or in the EARLIER order, that has an effect on the machine."""
        above = EARLIER[level] if self.is_earlier(level) else PREVIOUS[level]
        return self.previous(above) if self.has_no_effect(above) else above

    def marked(self, level: str, text: str) -> str:
        """Return `text` with a mark if the machine measured `level` in the EARLIER order."""
        return text + REORDERED * self.is_earlier(level)

    def change(self, previous: str, level: str, column: str) -> str:
        """Format one number of the level before and of `level`, as `before → after`."""
        return f"{self.cell(previous, column)} → {self.cell(level, column)}"


def read() -> list[Climb]:
    """Return the machines of the gallery: FIRST, then by gain, the largest first."""
    climbs = [Climb(path.stem, gallery.read(path)) for path in sorted(gallery.FOLDER.glob("*.json"))]

    def rank(climb: Climb) -> tuple[bool, float]:
        over = climb.gains["levels"][climb.fastest]["over_baseline"]
        return climb.name != FIRST, -over["ratio"] if over else 0.0

    return sorted(climbs, key=rank)


def ladder_table(climbs: Sequence[Climb], remarks: Mapping[str, str]) -> tables.Table:
    """Return one row a speed level: what changes, with `remarks`, and its gain on each machine."""
    rows = [["level", "what changes", *(climb.machine.title for climb in climbs)]]
    rates = (f"{climb.cell(BASELINE, 'tokens_per_second')} tokens/s" for climb in climbs)
    rows.append([f"`{BASELINE}`", "the baseline", *rates])
    for level, previous in PREVIOUS.items():
        change = f"`{tables.switch_that_changes(ROWS[level], ROWS[previous])}`{remarks.get(level, '')}"
        gains = (climb.marked(level, climb.cell(level, "over_previous")) for climb in climbs)
        rows.append([f"`{level}`", change, *gains])
    fastest = (climb.cell(climb.fastest, "over_baseline") if climb.fastest != BASELINE else "none" for climb in climbs)
    rows.append([f"best over `{BASELINE}`", "", *fastest])
    rows.append(["control", f"`{BASELINE}` again", *(str(Gain(**climb.gains["control"])) for climb in climbs)])
    return rows


def readme_part(climbs: Sequence[Climb]) -> str:
    """Return the README's table: the ladder on some machines, and the memory that the first one needs."""
    rows = ladder_table(climbs, {})
    for row in rows[1:]:
        level = row[0].strip("`")
        peak = climbs[0].machine.levels.get(level, gallery.Training()).peak_memory_mib
        row.append(climbs[0].marked(level, f"{peak / 1024:.1f}") if peak else "")
    return tables.markdown_table([[*rows[0], "H100 GiB"], *rows[1:]])


def machines_part(climbs: Sequence[Climb]) -> str:
    """Return the generated part of docs/machines.md: two tables, and a section a machine."""
    rows = []
    for climb in climbs:
        machine, run = climb.machine, climb.machine.benchmark
        apart = [level.loss_difference for level in machine.levels.values() if level.loss_difference is not None]
        row = {
            "machine": f"[{machine.title}](#{climb.name})",
            "model": run.model,
            "torch": run.environment.torch,
            "commit": machine.commit[:7],
            "day": str(machine.date),
            "tokens a step": f"{run.batch_size} x {run.block_size}",
            "rounds": str(len(run.rounds)),
            "processes": str(run.processes),
            f"`{BASELINE}` tokens/s": climb.cell(BASELINE, "tokens_per_second"),
            "fastest tokens/s": f"{climb.cell(climb.fastest, 'tokens_per_second')} (`{climb.fastest}`)",
            "losses within": f"{max(apart):.4f}" if apart else NOT_MEASURED,
        }
        rows.append(row)
    summary_table = [list(rows[0]), *(list(row.values()) for row in rows)]
    sections = [section(climb) for climb in climbs]
    return "\n\n".join(
        [tables.markdown_table(summary_table), tables.markdown_table(ladder_table(climbs, REMARKS)), *sections]
    )


def section(climb: Climb) -> str:
    """Return one machine's section of docs/machines.md."""
    machine = climb.machine.benchmark.environment
    software = f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}, Python {machine.python}"
    picture = f"![tokens per second at each level on the {climb.machine.title}](machines/{climb.name}.svg)"
    text = textwrap.fill(" ".join([f"{software}.", *climb.machine.notes]), 120)
    return "\n\n".join([f'<a id="{climb.name}"></a>', f"## {climb.machine.title}", picture, text])


def level_part(level: str, climbs: Sequence[Climb]) -> str:
    """Return the generated part of one level's page."""
    if level not in ROWS:
        return tables.markdown_table(quality_rows(level, climbs), text_columns=1)
    if level == BASELINE:
        columns = {"step_ms": "ms a step", "tokens_per_second": "tokens/s", "mfu": "of the peak"}
        columns["peak_memory_mib"] = "peak memory, MiB"
        rows = [[climb.machine.title, *(climb.cell(level, column) for column in columns)] for climb in climbs]
        return tables.markdown_table([["machine", *columns.values()], *rows], text_columns=1)
    rows = [["machine", f"gain over `{PREVIOUS[level]}`", "ms a step", "peak memory, MiB", "loss difference"]]
    measured = [climb for climb in climbs if climb.cell(level, "over_previous") not in (NOT_MEASURED, NOTHING)]
    for climb in measured:
        previous = climb.previous(level)
        over = "" if previous == PREVIOUS[level] else f" over `{previous}`"
        changes = (climb.change(previous, level, column) for column in ("step_ms", "peak_memory_mib"))
        rows.append([climb.machine.title, climb.cell(level, "over_previous") + over, *changes])
        rows[-1].append(climb.cell(level, "loss_difference"))
    if not measured:
        return "Not measured yet on any machine."
    lines = [line for climb in measured if (line := operators_line(climb, climb.previous(level), level))]
    heading = "Operators whose time changed most, in ms, scaled to the median step (0.0: less than 0.5 %):\n\n"
    table = tables.markdown_table(rows, text_columns=1)
    if f"]{NOISE} " in table:
        table += f"\n\n\\{NOISE} Noise may explain this difference ([numbers.md](../numbers.md))."
    return table + ("\n\n" + heading + "\n".join(lines) if lines else "")


def quality_rows(level: str, climbs: Sequence[Climb]) -> tables.Table:
    """Return one row a machine with the losses of a quality level."""
    rows = [["machine", "parameters", "loss at step 0", "last loss", "validation loss", "peak memory, MiB"]]
    for climb in climbs:
        losses = climb.machine.levels[level].losses if level in climb.machine.levels else ()
        ends = (f"{losses[index]:.4f}" if losses else NOT_MEASURED for index in (0, -1))
        rest = (climb.cell(level, column) for column in ("val_loss", "peak_memory_mib"))
        rows.append([climb.machine.title, climb.cell(level, "parameters"), *ends, *rest])
    return rows


def operators_line(climb: Climb, previous: str, level: str) -> str | None:
    """Return a list item with the operators whose time changed most; None if the gain may be noise."""
    over = climb.gains["levels"][level]["over_previous"]
    if over["verdict"] == facts.NO_GAIN or over["over"] != previous:
        return None
    trainings = {name: climb.machine.levels.get(name, gallery.Training()) for name in (previous, level)}
    operators = {name: [asdict(row) for row in training.operators] for name, training in trainings.items()}
    if not all(operators.values()):
        return None
    before, after = (facts.operator_ms(name, climb.gains, operators) for name in operators)
    changed = [name for name in facts.largest_changes(before, after) if name != gallery.OTHERS][:OPERATORS]
    texts = (f"`{name}` {milliseconds(before[name])} → {milliseconds(after[name])}" for name in changed)
    return f"- {climb.machine.title}: {', '.join(texts)}"


def picture(climb: Climb) -> str:
    """Return a machine's ladder as an SVG."""
    run = climb.machine.benchmark
    title = f"GPT-2 ({run.model}) on {climb.machine.title}, {run.batch_size} x {run.block_size} tokens a step"
    return charts.svg(charts.waterfall(facts.ladder_steps(climb.gains)).properties(width=620, title=title))


def contents() -> dict[Path, str]:
    """Return the text of every file that `make docs` writes."""
    climbs = read()
    in_readme = [climb for name in IN_README for climb in climbs if climb.name == name]
    parts = {README: ("ladder", readme_part(in_readme)), MACHINES: ("machines", machines_part(climbs))}
    levels = [level for level in PARAMS.levels if (LEVELS / f"{level}.md").exists()]
    parts |= {LEVELS / f"{level}.md": ("measured", level_part(level, climbs)) for level in levels}
    pictures = {PICTURES / f"{climb.name}.svg": picture(climb) for climb in climbs}
    return {**{page: pages.replace(page, *part) for page, part in parts.items()}, **pictures}


if __name__ == "__main__":
    for path, text in contents().items():
        files.write(path, text)
