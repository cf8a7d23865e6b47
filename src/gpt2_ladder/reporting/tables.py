"""Format results as text tables for pages and terminals. A table is a list of rows; the first row has the titles."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_ladder.config import NO_EFFECT, Level, Switches
from gpt2_ladder.ledger import PHASES
from gpt2_ladder.measuring.gains import NO_GAIN, Gain, Measurement

Metrics = Mapping[str, Any]
Table = list[list[str]]
MISSING = "\N{EN DASH}"

TRAINING_COLUMNS = {  # key in metrics.json: (title, format)
    "parameters": ("parameters", "{:,}"),
    "loss_first": ("loss at step 0", "{:.4f}"),
    "loss_last": ("last loss", "{:.4f}"),
    "val_loss": ("validation loss", "{:.4f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "tokens_per_second": ("training tokens/s", "{:,.0f}"),
    "goodput": ("goodput", "{:,.0f}"),
}


def switch_that_changes(level: Switches, previous: Switches | None) -> str:
    """Return the switches in which `level` differs from `previous`, as params.yaml has them."""
    if previous is None:
        return "start: PyTorch's defaults"
    changed = [name for name in Switches.model_fields if getattr(level, name) != getattr(previous, name)]
    return ", ".join(f"{name}: {getattr(level, name)}".lower() for name in changed) or "the speed shape only"


def training_table(levels: Mapping[str, Level], results: Mapping[str, Metrics], trial: Metrics) -> Table:
    """Return one row per level with parameters, losses and training speed, and a row for `trial`."""
    rows = [[name, change, *_training_cells(results[name])] for name, change in _changes(levels).items()]
    titles = ["level", "switch that changes", *(title for title, _ in TRAINING_COLUMNS.values())]
    return [titles, *rows, ["trial", "as set in params.yaml", *_training_cells(trial)]]


def speed_table(levels: Mapping[str, Level], results: Mapping[str, Metrics], gains: Metrics, parity: Metrics) -> Table:
    """Return one row per speed level with gains, throughput and memory; a skipped level has dashes or NO_EFFECT."""
    rows: list[dict[str, str]] = []
    for name, change in _changes(levels).items():
        if levels[name].group == "speed":
            rows.append({"level": name, "switch that changes": change})
            if NO_EFFECT in (results[name]["reason"] or ""):
                rows[-1]["over the previous level"] = NO_EFFECT
        if gain := gains["levels"].get(name):
            result, difference = results[name], f"{parity['levels'][name]['largest']:.4f}"
            share, check = gain.get("mfu_of_product"), gain.get("step_check")  # older results have none
            compiled = f"{result['compile_seconds'] or 0:,.0f} {result['compile_cache']}"
            rows[-1] |= {
                "over the previous level": gain_cell(gain["over_previous"]),
                "over the baseline": gain_cell(gain["over_baseline"]),
                "tokens/s": f"{gain['tokens_per_second']:,.0f}",
                "TFLOP/s (of the peak)": f"{gain['tflops']:.3g}" + (f" ({gain['mfu']:.0%})" if gain["mfu"] else ""),
                **({"of its own product": f"{share:.0%}"} if share not in (None, gain["mfu"]) else {}),
                "peak memory MiB": f"{result['peak_memory_mib']:,.0f}",
                "compilation s": MISSING if result["compile_seconds"] is None else compiled,
                "loss difference": MISSING if name == parity["baseline"] else difference,
                **({"gradient difference": f"{check['gradient']:.0e}"} if check else {}),
            }
    titles = max(map(list, rows), key=len)
    return [titles, *([row.get(title, MISSING) for title in titles] for row in rows)]


def device_time_table(device_time: Mapping[str, Metrics]) -> Table:
    """Return one row per level of `device_time`, the content of device_time.json; only a header for a CPU."""
    titles = ["level", "busy ms", "idle ms", "idle in gaps over 5 us", "idle in shorter gaps"]
    rows = [titles]
    for name, row in device_time.items():
        parts = row["busy_ms"], row["idle_ms"], row["long_gaps_ms"], row["idle_ms"] - row["long_gaps_ms"]
        rows.append([name, *(f"{ms:.2f}" for ms in parts)])
    return rows


def seconds_table(seconds: Mapping[str, Mapping[str, float]]) -> Table:
    """Return one row per stage with its seconds in each phase of ledger.PHASES, and a last row with the sums."""
    total = {phase: sum(spent.get(phase, 0) for spent in seconds.values()) for phase in PHASES}
    rows = [["stage", *PHASES, "all"]]
    for name, spent in {**seconds, "all": total}.items():
        values = [*(spent.get(phase, 0) for phase in PHASES), sum(spent.values())]
        rows.append([name, *(f"{value:.1f}" if value >= 0.05 else MISSING for value in values)])
    return rows


def side_by_side(here: Measurement, there: Measurement) -> Table:
    """Return one row per level with its step time and gain on two machines; gains compare levels, not machines."""
    places = ("here", here), ("there", there)
    noise = {place: machine.noise() for place, machine in places}
    columns = ("ms a step", "over the previous level")
    titles = ["level", *(f"{place}: {column}" for place, _ in places for column in columns)]
    rows = [[name] for name in dict.fromkeys([*here.levels, *there.levels])]
    for row in rows:
        for place, machine in places:
            if row[0] not in machine.levels:
                row += [MISSING, MISSING]
                continue
            index = machine.levels.index(row[0])
            gain = machine.compare(row[0], machine.levels[index - 1], noise[place]) if index else None
            row += [f"{statistics.median(machine.step_ms(row[0])):,.0f}", gain_cell(gain)]
    return [titles, *rows]


def markdown_table(table: Sequence[Sequence[str]], text_columns: int = 2) -> str:
    """Return a Markdown table with padded cells. The first `text_columns` columns are aligned left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left, right = widths[:text_columns], widths[text_columns:]
    line = " | ".join([*(f"{{:<{width}}}" for width in left), *(f"{{:>{width}}}" for width in right)])
    rule = [*("-" * width for width in left), *("-" * (width - 1) + ":" for width in right)]
    return "\n".join(f"| {line.format(*row)} |" for row in (table[0], rule, *table[1:]))


def gain_cell(gain: Metrics | None) -> str:
    """Format one entry of gains.json as `1.87 [1.80, 1.95]`; if it may be noise, with NO_GAIN instead of the ratio."""
    if gain is None:
        return MISSING
    if gain["verdict"] == NO_GAIN:
        return f"{NO_GAIN} [{gain['low']:.2f}, {gain['high']:.2f}]"
    return str(Gain(gain["ratio"], gain["low"], gain["high"]))


def _changes(levels: Mapping[str, Level]) -> dict[str, str]:
    """Return the switches that each level changes, by level."""
    previous = [None, *levels.values()]
    return {name: switch_that_changes(level, previous[i]) for i, (name, level) in enumerate(levels.items())}


def _training_cells(metrics: Metrics) -> list[str]:
    """Format the TRAINING_COLUMNS of one metrics.json; a skipped level has dashes."""
    return [
        template.format(metrics[name]) if metrics[name] is not None else MISSING
        for name, (_, template) in TRAINING_COLUMNS.items()
    ]
