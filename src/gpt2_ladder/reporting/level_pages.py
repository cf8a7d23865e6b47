"""Render one page of measured numbers per level for results/report/levels; docs/levels explains the levels."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gpt2_ladder.config import Level
from gpt2_ladder.measuring.gains import NO_GAIN
from gpt2_ladder.reporting import facts, tables

MAX_OPERATORS = 12  # rows of a page's profile table
NOTABLE = 0.005  # share of a step's time; operators whose time changed by less are not listed


def pages(ladder: facts.Ladder, explained: Collection[str]) -> dict[str, str]:
    """Return {file name: page}: an index and a page per level, which links to docs/levels if it is in `explained`."""
    levels, results, gains = ladder.levels, ladder.results, ladder.gains
    speed = tables.speed_table(levels, results, gains, ladder.parity)
    training = tables.training_table(levels, results)
    common = {"environment": ladder.environment, "rounds": gains["rounds"], "table": tables.markdown_table}
    rendered, above = {}, None
    trained: dict[str, str] = {}  # {group: its previous trained level}
    for name, level in levels.items():
        previous = trained.get(level.group)
        rendered[f"{name}.md"] = _render(
            "level.md",
            **common,
            name=name,
            explained=name in explained,
            previous=previous,
            above=above,
            diff=row_diff(level, levels[above] if above else None),
            group=level.group,
            shape=ladder.shapes[level.group],
            measured=_transpose(speed if level.group == "speed" else training, [previous, name]),
            notes=[note for note in (results[name]["reason"], results[name]["note"]) if note],
            undecided=[line for line in facts.undecided(gains) if line.startswith(f"`{name}` over `{previous}`")],
            profile=_profile(name, previous, gains, ladder.operators),
        )
        above = name
        if results[name]["status"] == "trained":
            trained[level.group] = name
    index = [["level", "switch that changes"], *([f"[`{row[0]}`]({row[0]}.md)", row[1]] for row in training[1:])]
    return {"README.md": _render("level_index.md", **common, index=index), **rendered}


def row_diff(level: Level, above: Level | None) -> str:
    """Return the diff between the row `above` in params.yaml and the row `level`; without `above`, the whole row."""
    lines = []
    for switch, value in level:
        if above is None or getattr(above, switch) != value:
            lines += [f"-{switch}: {tables.switch_value(getattr(above, switch))}"] if above else []
            lines += [f"+{switch}: {tables.switch_value(value)}"]
    return "\n".join(lines)


def _render(template: str, **content: Any) -> str:
    text = facts.templates.get_template(template).render(**content)
    return re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"


def _transpose(table: tables.Table, names: Sequence[str | None]) -> tables.Table:
    """Return a table whose columns are the rows of levels `names`, without the cell "switch that changes"."""
    rows = [row for name in names for row in table[1:] if row[0] == name]
    return [[title, *(row[column] for row in rows)] for column, title in enumerate(table[0]) if column != 1]


def _profile(
    name: str, previous: str | None, gains: tables.Metrics, operators: Mapping[str, Sequence[tables.Metrics]]
) -> tables.Table | None:
    """Return a table of the operators whose time changed most from `previous` to `name`; None if not profiled.

    Without `previous`, list the costliest operators. If the gain may be noise, list only operators whose number of
    calls changed, because the changes of their times may be noise too.
    """
    names = [level for level in (previous, name) if level]
    if not all(operators.get(level) for level in names):
        return None
    ms = {level: facts.operator_ms(level, gains, operators) for level in names}
    calls = {level: Counter({row["name"]: row["calls"] for row in operators[level]}) for level in names}
    old, new = ms[previous] if previous else defaultdict(float), ms[name]
    listed = [op for op in facts.largest_changes(old, new) if abs(new[op] - old[op]) > NOTABLE * sum(new.values())]
    if previous and gains["levels"][name]["over_previous"]["verdict"] == NO_GAIN:
        listed = [op for op in listed if calls[previous][op] != calls[name][op]]
    rows = [
        [f"`{op}`", *(str(calls[level][op]) for level in names), *(f"{ms[level][op]:,.0f}" for level in names)]
        for op in listed[:MAX_OPERATORS]
    ]
    return [["operator", *(f"{what}, `{level}`" for what in ("calls", "ms") for level in names)], *rows]
