"""One page a level for docs/levels: hand-written prose around code and numbers that nobody types.

The prose is in templates/levels; the code is cut out of the source files, the numbers out of results/.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_ladder.config import Environment, Level, Shape
from gpt2_ladder.measuring.gains import NO_GAIN
from gpt2_ladder.reporting import facts, tables

TOP = Path(__file__).parents[3]
LARGEST = 8  # operators of a page's table
NOTABLE = 0.005  # of a step's time: an operator below that is not named as new or gone


def excerpt(file: str, symbol: str, *words: str) -> str:
    """Return the statements of `symbol` ("function" or "Class.method") in `file` that have one of `words` in them.

    With the comments above them, below the signature, and with `...` for what lies between; without `words` the whole
    body but its docstring. Of a statement with a body of its own, such as `if`, the head decides.

    Raises:
        LookupError: there is no such symbol, or one of the words is nowhere in it: the page would show something else.
    """
    text = (TOP / file).read_text(encoding="utf-8")
    lines, node = text.splitlines(), _find(ast.parse(text), file, symbol)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    spans = [(body[0].lineno, node.end_lineno)] if not words else list(_spans(body, lines, words))
    shown, last = lines[node.lineno - 1 : node.body[0].lineno - 1], body[0].lineno - 1
    for start, end in spans:
        start = _with_comments(start, lines)
        if start > last + 1:
            shown.append(re.sub(r"\S.*", "...", lines[last]))
        shown += lines[start - 1 : end]
        last = end
    if missing := [word for word in words if not any(word in line for line in shown)]:
        raise LookupError(f"{file}: {symbol} has no {missing[0]!r} any more: mend the level's page in templates/levels")
    return f"```python\n# {file}: {symbol}\n{textwrap.dedent(chr(10).join(shown))}\n```"


def _find(node: Any, file: str, symbol: str) -> Any:
    for name in symbol.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == name), None)
        if node is None:
            raise LookupError(f"{file}: there is no {symbol} any more: mend the level's page in templates/levels")
    return node


def _spans(body: Sequence[Any], lines: Sequence[str], words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield first and last line of every statement whose head has one of `words`, the outermost of nested ones."""
    for statement in body:
        inner = getattr(statement, "body", None)
        head = lines[statement.lineno - 1 : inner[0].lineno - 1 if inner else statement.end_lineno]
        if any(word in line for word in words for line in head):
            yield statement.lineno, statement.end_lineno
        elif inner and (within := list(_spans([*inner, *getattr(statement, "orelse", [])], lines, words))):
            yield statement.lineno, _with_comments(inner[0].lineno, lines) - 1  # its head alone
            yield from within


def _with_comments(line: int, lines: Sequence[str]) -> int:
    """Return the first line of the comments above `line`, or `line`."""
    while lines[line - 2].lstrip().startswith("#"):
        line -= 1
    return line


def row_diff(level: Level, previous: Level | None) -> str:
    """Return a row of params.yaml as it differs from the one above; the first one whole."""
    rows = [level.model_dump()] if previous is None else [previous.model_dump(), level.model_dump()]
    changed = [key for key in rows[-1] if len(rows) == 1 or rows[0][key] != rows[1][key]]
    signs = "-+"[-len(rows) :]
    return "\n".join(
        f"{sign}{key}: {tables.word(row[key])}" for key in changed for sign, row in zip(signs, rows, strict=True)
    )


def pages(
    levels: Mapping[str, Level],
    shapes: Mapping[str, Shape],
    results: Mapping[str, tables.Metrics],
    gains: tables.Metrics,
    parity: tables.Metrics,
    operators: Mapping[str, Sequence[tables.Metrics]],
    environment: Environment,
) -> dict[str, str]:
    """Return the index and a page for every level that has prose, by file name; a row of one's own has none."""
    speed = tables.speed_table(levels, results, gains, parity)
    training = tables.training_table(levels, results)
    written = [name for name in levels if f"levels/{name}.md" in facts.templates.list_templates()]
    above = dict(zip(list(levels)[1:], levels, strict=False))
    common = {"environment": environment, "rounds": gains["rounds"], "table": tables.markdown_table, "code": excerpt}
    found: dict[str, str] = {}
    for name in written:
        level, table = levels[name], speed if levels[name].group == "speed" else training
        before = _before(name, levels, gains)
        found[f"{name}.md"] = _render(
            f"levels/{name}.md",
            **common,
            name=name,
            before=before,
            above=above.get(name),
            diff=row_diff(level, levels[above[name]] if name in above else None),
            group=level.group,
            shape=shapes[level.group],
            measured=_turned(table, [one for one in (before, name) if one]),
            notes=[note for note in (results[name]["reason"], results[name]["note"]) if note],
            undecided=[line for line in facts.undecided(gains) if line.startswith(f"`{name}` over `{before}`")],
            profile=_profile(name, before, gains, operators) if name in gains["levels"] else None,
        )
    titles = [["level", "switch that changes", "over the level before", "validation loss"]]
    gained = {row[0]: row[2] for row in speed[1:]}
    rows = [
        [
            f"[`{row[0]}`]({row[0]}.md)" if row[0] in written else f"`{row[0]}`",
            row[1],
            gained.get(row[0], tables.MISSING),
            row[training[0].index("validation loss")],
        ]
        for row in training[1:]
    ]
    return {"README.md": _render("levels.md", **common, index=titles + rows), **found}


def _render(template: str, **content: Any) -> str:
    text = facts.templates.get_template(template).render(**content)
    return re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"


def _before(name: str, levels: Mapping[str, Level], gains: tables.Metrics) -> str | None:
    """Return the level to compare with: the one that the benchmark did, or the one above in the same group."""
    measured = gains["levels"].get(name)
    if measured:
        return measured["over_previous"]["over"] if measured["over_previous"] else None
    peers = [other for other in levels if levels[other].group == levels[name].group]
    return peers[peers.index(name) - 1] if name != peers[0] else None


def _turned(table: tables.Table, names: Sequence[str]) -> tables.Table:
    """Return the rows of `names` as columns, without the switch that changes."""
    rows = [row for name in names for row in table[1:] if row[0] == name]
    return [[title, *(row[column] for row in rows)] for column, title in enumerate(table[0]) if column != 1]


def _profile(
    name: str, before: str | None, gains: tables.Metrics, operators: Mapping[str, Sequence[tables.Metrics]]
) -> dict[str, Any] | None:
    """Return what the profiled steps show: operators that only one level has, and those that changed most.

    Where the gain may be noise, so may be every operator's time: then only those are listed whose calls changed. With
    none `before`, the costliest.
    """
    names = [one for one in (before, name) if one]
    if not all(operators.get(one) for one in names):
        return None
    ms = {one: _own_ms(operators[one], gains["levels"][one]["step_ms"]) for one in names}
    calls = {one: Counter({operator["name"]: operator["calls"] for operator in operators[one]}) for one in names}
    earlier = ms[before] if before else Counter[str]()
    changes = {key: abs(ms[name][key] - earlier[key]) for key in {*earlier, *ms[name]}}
    notable = [key for key in changes if changes[key] > NOTABLE * ms[name].total()]
    if before and gains["levels"][name]["over_previous"]["verdict"] == NO_GAIN:
        notable = [key for key in notable if calls[before][key] != calls[name][key]]
    notable.sort(key=lambda key: (-changes[key], key))
    titles = ["operator", *(f"{what}, `{one}`" for what in ("calls", "ms") for one in names)]
    rows = [
        [f"`{key}`", *(str(calls[one][key]) for one in names), *(f"{ms[one][key]:,.0f}" for one in names)]
        for key in notable[:LARGEST]
    ]
    return {
        "gone": [key for key in notable if before and key not in ms[name]],
        "new": [key for key in notable if before and key not in earlier],
        "table": [titles, *rows] if rows else None,
    }


def _own_ms(operators: Sequence[tables.Metrics], step_ms: float) -> Counter[str]:
    """Return the milliseconds of each operator by its name, their sum made `step_ms`.

    torch's name for a graph is left out: it counts those compiled before it, so it is another one each time.
    """
    ms = facts.scaled(operators, step_ms)
    return Counter({name: own for name, own in ms.items() if not name.startswith("Torch-Compiled Region")})
