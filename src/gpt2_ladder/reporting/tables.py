"""Results -> tables of text, titles first, that a report, a page or a terminal shows; and the cells in them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_ladder.config import Level, Switches
from gpt2_ladder.measuring.gains import NO_GAIN, Gain, Measurement

Metrics = Mapping[str, Any]
Table = list[list[str]]
MISSING = "\N{EN DASH}"  # as tables have it

TRAINING_COLUMNS = {  # key in metrics.json: title, format
    "parameters": ("parameters", "{:,}"),
    "loss_first": ("loss at step 0", "{:.4f}"),
    "loss_last": ("last loss", "{:.4f}"),
    "val_loss": ("validation loss", "{:.4f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "tokens_per_second": ("tokens/s in passing", "{:,.0f}"),
}
SPEED_TITLES = [
    "level",
    "switch that changes",
    "over the level before",
    "over the baseline",
    "tokens/s",
    "TFLOP/s (of the peak)",
    "peak memory MiB",
    "compilation s",
    "loss apart by",
]


def switch_that_changes(level: Switches, previous: Switches | None, same: str = "the speed shape only") -> str:
    """Return the switches in which `level` differs from `previous`, as `name: value`; where there is none, `same`."""
    if previous is None:
        return "start: PyTorch's defaults"
    changed = [name for name in Switches.model_fields if getattr(level, name) != getattr(previous, name)]
    return ", ".join(f"{name}: {word(getattr(level, name))}" for name in changed) or same


def training_table(levels: Mapping[str, Level], results: Mapping[str, Metrics], trial: Metrics | None = None) -> Table:
    """Return the titles, one row of text a level in the ladder's order, and the trial's if it is given."""
    changes = _changes(levels)
    rows = [[name, changes[name], *training_cells(results[name])] for name in levels]
    titles = ["level", "switch that changes", *(title for title, _ in TRAINING_COLUMNS.values())]
    return [titles, *rows, *([["trial", "the knobs of params.yaml", *training_cells(trial)]] if trial else [])]


def speed_table(levels: Mapping[str, Level], results: Mapping[str, Metrics], gains: Metrics, parity: Metrics) -> Table:
    """Return the titles and one row of text a speed level; a skipped one has dashes."""
    changes, rows = _changes(levels), []
    for name in (name for name, level in levels.items() if level.group == "speed"):
        found = gains["levels"].get(name)
        if found is None:
            rows.append([name, changes[name], *[MISSING] * (len(SPEED_TITLES) - 2)])
            continue
        seconds = results[name]["compile_seconds"]
        rows.append(
            [
                name,
                changes[name],
                *(gain_cell(found[over]) for over in ("over_previous", "over_baseline")),
                f"{found['tokens_per_second']:,.0f}",
                f"{found['tflops']:.3g}" + (f" ({found['mfu']:.0%})" if found["mfu"] is not None else ""),
                f"{results[name]['peak_memory_mib']:,.0f}",
                MISSING if seconds is None else f"{seconds:,.0f} {results[name]['compile_cache']}",
                f"{parity['levels'][name]['largest']:.4f}" if name != parity["baseline"] else MISSING,
            ]
        )
    return [SPEED_TITLES, *rows]


def side_by_side(here: Measurement, there: Measurement) -> Table:
    """Return two machines' gains as a table, titles first.

    Every gain is a ratio within one machine: no number of one is set against a number of the other.
    """
    noises = {id(machine): machine.noise() for machine in (here, there)}
    titles = [
        "level",
        *(f"{place}: {what}" for place in ("here", "there") for what in ("ms a step", "over the level before")),
    ]
    rows = [[name] for name in dict.fromkeys([*here.levels, *there.levels])]
    for row in rows:
        for machine in (here, there):
            if row[0] not in machine.levels:
                row += [MISSING, MISSING]
                continue
            index = machine.levels.index(row[0])
            previous = machine.levels[index - 1] if index else None
            found = machine.compare(row[0], previous, noises[id(machine)]) if previous else None
            row += [f"{statistics.median(machine.step_ms(row[0])):,.0f}", gain_cell(found)]
    return [titles, *rows]


def markdown_table(table: Sequence[Sequence[str]], words: int = 2) -> str:
    """Return a Markdown table, titles first, padded so that a terminal shows it well too.

    The first `words` columns stand to the left, the others, numbers, to the right.
    """
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if column < words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(table[0]), f"| {' | '.join(rule)} |", *(line(row) for row in table[1:])])


def _changes(levels: Mapping[str, Level]) -> dict[str, str]:
    """Return what every level changes against the one before."""
    previous = [None, *levels.values()]
    return {name: switch_that_changes(level, previous[i]) for i, (name, level) in enumerate(levels.items())}


def gain_cell(found: Metrics | None) -> str:
    """Write one entry of gains.json as `1.87 [1.80, 1.95]`; what may be noise gets no number."""
    if found is None:
        return MISSING
    if found["verdict"] == NO_GAIN:
        return f"{NO_GAIN} [{found['low']:.2f}, {found['high']:.2f}]"
    return str(Gain(found["ratio"], found["low"], found["high"]))


def training_cells(metrics: Metrics) -> list[str]:
    """Return the cells of TRAINING_COLUMNS; a skipped level has dashes."""
    return [
        template.format(metrics[name]) if metrics[name] is not None else MISSING
        for name, (_, template) in TRAINING_COLUMNS.items()
    ]


def word(value: object) -> str:
    """Write a switch's value as params.yaml has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
