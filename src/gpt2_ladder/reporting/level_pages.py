"""Render one page of measured numbers per level, for results/report/levels.

The hand-written explanations of the levels are in docs/levels.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gpt2_ladder.config import Environment, Level, Shape
from gpt2_ladder.measuring.gains import NO_GAIN
from gpt2_ladder.reporting import facts, tables

MAX_OPERATORS = 8  # rows of a page's profile table
NOTABLE = 0.005  # share of a step's time below which an operator is not listed


def row_diff(level: Level, previous: Level | None) -> str:
    """Return how a row of params.yaml differs from the previous one, as a diff; the first row in full."""
    new, old = level.model_dump(), previous.model_dump() if previous else {}
    lines = []
    for switch in new:
        if switch in old and old[switch] != new[switch]:
            lines.append(f"-{switch}: {tables.switch_value(old[switch])}")
        if switch not in old or old[switch] != new[switch]:
            lines.append(f"+{switch}: {tables.switch_value(new[switch])}")
    return "\n".join(lines)


def pages(
    levels: Mapping[str, Level],
    shapes: Mapping[str, Shape],
    results: Mapping[str, tables.Metrics],
    gains: tables.Metrics,
    parity: tables.Metrics,
    operators: Mapping[str, Sequence[tables.Metrics]],
    environment: Environment,
    explained: Collection[str],
) -> dict[str, str]:
    """Return an index and one page per level, by file name; levels in `explained` link to their page in docs/levels."""
    speed = tables.speed_table(levels, results, gains, parity)
    training = tables.training_table(levels, results)
    common = {"environment": environment, "rounds": gains["rounds"], "table": tables.markdown_table}
    row_above: dict[str, str | None] = dict(zip(levels, [None, *levels], strict=False))
    rendered = {}
    for name, level in levels.items():
        above, previous = row_above[name], _previous(name, levels, gains)
        rendered[f"{name}.md"] = _render(
            "level.md",
            **common,
            name=name,
            explained=name in explained,
            previous=previous,
            above=above,
            diff=row_diff(level, levels[above] if above else None),
            group=level.group,
            shape=shapes[level.group],
            measured=_transpose(speed if level.group == "speed" else training, [previous, name]),
            notes=[note for note in (results[name]["reason"], results[name]["note"]) if note],
            undecided=[line for line in facts.undecided(gains) if line.startswith(f"`{name}` over `{previous}`")],
            profile=_profile(name, previous, gains, operators) if name in gains["levels"] else None,
        )
    gain_cells = {row[0]: row[2] for row in speed[1:]}
    val_loss = training[0].index("validation loss")
    index = [["level", "switch that changes", "over the previous level", "validation loss"]]
    index += [
        [f"[`{row[0]}`]({row[0]}.md)", row[1], gain_cells.get(row[0], tables.MISSING), row[val_loss]]
        for row in training[1:]
    ]
    return {"README.md": _render("level_index.md", **common, index=index), **rendered}


def _render(template: str, **content: Any) -> str:
    text = facts.templates.get_template(template).render(**content)
    return re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"


def _previous(name: str, levels: Mapping[str, Level], gains: tables.Metrics) -> str | None:
    """Return the level that `name` is compared with: in the benchmark, or else the one above it in its group."""
    if measured := gains["levels"].get(name):
        return measured["over_previous"]["over"] if measured["over_previous"] else None
    group = [other for other in levels if levels[other].group == levels[name].group]
    return group[group.index(name) - 1] if name != group[0] else None


def _transpose(table: tables.Table, names: Sequence[str | None]) -> tables.Table:
    """Return the rows of `names` as columns, without the switch that changes."""
    rows = [row for name in names for row in table[1:] if row[0] == name]
    return [[title, *(row[column] for row in rows)] for column, title in enumerate(table[0]) if column != 1]


def _profile(
    name: str, previous: str | None, gains: tables.Metrics, operators: Mapping[str, Sequence[tables.Metrics]]
) -> dict[str, Any] | None:
    """Return which operators are new, gone, or changed most from `previous` to `name`; None if not profiled.

    Where the gain may be noise, so may the operators' times: then only operators whose number of calls changed are
    listed. Without `previous`, the costliest are.
    """
    names = [level for level in (previous, name) if level]
    if not all(operators.get(level) for level in names):
        return None
    ms = {level: _operator_ms(operators[level], gains["levels"][level]["step_ms"]) for level in names}
    calls = {level: Counter({row["name"]: row["calls"] for row in operators[level]}) for level in names}
    old_ms = ms[previous] if previous else Counter[str]()
    changes = {operator: abs(ms[name][operator] - old_ms[operator]) for operator in {*old_ms, *ms[name]}}
    notable = [operator for operator in changes if changes[operator] > NOTABLE * ms[name].total()]
    if previous and gains["levels"][name]["over_previous"]["verdict"] == NO_GAIN:
        notable = [operator for operator in notable if calls[previous][operator] != calls[name][operator]]
    notable.sort(key=lambda operator: (-changes[operator], operator))
    titles = ["operator", *(f"{what}, `{level}`" for what in ("calls", "ms") for level in names)]
    rows = [
        [
            f"`{operator}`",
            *(str(calls[level][operator]) for level in names),
            *(f"{ms[level][operator]:,.0f}" for level in names),
        ]
        for operator in notable[:MAX_OPERATORS]
    ]
    return {
        "gone": [operator for operator in notable if previous and operator not in ms[name]],
        "new": [operator for operator in notable if previous and operator not in old_ms],
        "table": [titles, *rows] if rows else None,
    }


def _operator_ms(operators: Sequence[tables.Metrics], step_ms: float) -> Counter[str]:
    """Return each operator's milliseconds, scaled so that they add up to `step_ms`.

    torch's name for a compiled graph is left out: it is numbered by the graphs compiled before it.
    """
    scaled = facts.scaled(operators, step_ms)
    return Counter({name: ms for name, ms in scaled.items() if not name.startswith("Torch-Compiled Region")})
