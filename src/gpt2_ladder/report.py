"""Results -> what the report says, once; the two templates (ladder.md, ladder.html) only lay it out.

Pure: what it is given is what it shows.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from gpt2_ladder.config import Environment, Level, Shape, Switches
from gpt2_ladder.cost import KNOWN_PEAKS
from gpt2_ladder.gains import NO_GAIN, Gain, Measurement
from gpt2_ladder.parity import check_one_count, check_one_environment

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
WEIGHTS = {"openai": "OpenAI's published weights", "stand-in": "random stand-in weights"}
templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


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


def ladder_steps(gains: Metrics) -> list[dict[str, Any]]:
    """Return the rows of charts.waterfall: the baseline's tokens/s, times every level's gain over the baseline."""
    steps: list[dict[str, Any]] = []
    for name, found in gains["levels"].items():
        over = found["over_baseline"]
        if over is None:
            end = rate = found["tokens_per_second"]
            steps.append({"start": 0, "end": end, "low": end, "high": end, "verdict": "baseline", "label": ""})
        else:
            low, end, high = (rate * over[key] for key in ("low", "ratio", "high"))
            before = found["over_previous"]
            steps.append({"start": steps[-1]["end"], "end": end, "low": low, "high": high})
            steps[-1] |= {"verdict": before["verdict"], "label": f"{before['ratio']:.2f} x"}
        steps[-1]["level"] = name
    return steps


def reasons(gains: Metrics, operators: Mapping[str, Sequence[Metrics]]) -> list[str]:
    """Return one line on why, for every speed level that is measurably faster or slower than the level before.

    Only one step of a level is profiled, on a machine that drifts, so its operators' times are scaled to the median
    step: what the profile says is how that time is divided.
    """
    lines = []
    for name, found in gains["levels"].items():
        over = found["over_previous"]
        if over and over["verdict"] != NO_GAIN and operators.get(name) and operators.get(over["over"]):
            before_ms, after_ms = gains["levels"][over["over"]]["step_ms"], found["step_ms"]
            why = explain(scaled(operators[over["over"]], before_ms), scaled(operators[name], after_ms))
            lines.append(f"`{name}`: {before_ms:,.0f} -> {after_ms:,.0f} ms a step; {why}")
    return lines


def scaled(operators: Sequence[Metrics], step_ms: float) -> dict[str, float]:
    """Return the milliseconds of each operator, their sum made `step_ms`."""
    total = sum(operator["self_ms"] for operator in operators)
    return {operator["name"]: operator["self_ms"] * step_ms / total for operator in operators}


def explain(before: Mapping[str, float], after: Mapping[str, float], count: int = 3) -> str:
    """Return in one line which operators changed most between two levels, from their milliseconds by name."""
    changes = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in {*before, *after}}
    largest = sorted(changes, key=lambda name: (-abs(changes[name]), name))[:count]
    return ", ".join(f"{name} {before.get(name, 0.0):,.0f} -> {after.get(name, 0.0):,.0f} ms" for name in largest)


def undecided(gains: Metrics) -> list[str]:
    """Return one line for every gain that cannot be told from noise: how many rounds would."""
    lines = []
    for name, found in gains["levels"].items():
        pairs = {over["over"]: over for over in (found["over_previous"], found["over_baseline"]) if over}
        for over in (one for one in pairs.values() if one["verdict"] == NO_GAIN):
            many = over["rounds_to_settle"]
            settle = "over 10,000 rounds" if many is None or many > 10_000 else f"about {many:,} rounds"
            lines.append(
                f"`{name}` over `{over['over']}`: {NO_GAIN} in {gains['rounds']} rounds; if it is {over['ratio']:.3f}, "
                f"{settle} would show it"
            )
    return lines


def micro_batch_notes(results: Mapping[str, Metrics], batch_size: int) -> list[str]:
    """Return what a reader must know where a whole batch of a speed level did not fit into memory at once."""
    rows = {name: found["micro_batch"] for name, found in results.items()}
    least = min(rows.values())
    if least == batch_size:
        return []
    notes = [f"memory holds {least} of a batch's {batch_size} rows at a time: gradients were accumulated"]
    return notes + [
        f"`{name}` was trained with {many} rows at a time where others had {least}: compare the benchmark, which gave "
        f"all {least}, not the trainings' tokens/s and memory"
        for name, many in rows.items()
        if many != least
    ]


def device_notes(trainings: Mapping[str, Metrics], gains: Metrics, device_name: str) -> list[str]:
    """Return what a reader must know of `trainings` on several devices at once: what is theirs together, what of one.

    They reach a share of the peak of all where the device is a GPU with a known one: a CPU's ranks may share it.
    """
    count = trainings["trial"]["devices"]
    if count == 1:
        return []
    notes = [
        f"the speed levels and the trial were trained on {count} devices: their tokens/s in passing are of all of them "
        "together, peak memory is that of one; gains, and the tokens/s and shares beside them, were measured on one"
    ]
    for name, one in gains["levels"].items() if device_name in KNOWN_PEAKS else ():
        if one["mfu"] is not None:  # its FLOPs of a token over one peak, times the rate, over as many peaks
            share = one["mfu"] / one["tokens_per_second"] * trainings[name]["tokens_per_second"] / count
            notes.append(f"`{name}` trained at {share:.0%} of the peak of all {count} devices")
    return notes


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


def facts(
    model: str,
    levels: Mapping[str, Level],
    results: Mapping[str, Metrics],
    gains: Metrics,
    parity: Metrics,
    operators: Mapping[str, Sequence[Metrics]],
    trial: Metrics,
    verify: Metrics,
    overfit: Metrics,
    environment: Environment,
    shapes: Mapping[str, Shape],
) -> dict[str, Any]:
    """Return everything that the templates lay out.

    Raises:
        UserError: a level was measured in another environment, or trained on another number of devices.
    """
    check_one_environment({**results, "trial": trial, "benchmark": gains, "parity": parity}, environment)
    trainings = {**{name: results[name] for name, level in levels.items() if level.group == "speed"}, "trial": trial}
    check_one_count(trainings)
    notes = [
        f"`{name}`: {metrics['reason'] or metrics['note']}"
        for name, metrics in {**results, "trial": trial}.items()
        if metrics["reason"] or metrics["note"]
    ]
    notes += micro_batch_notes({name: results[name] for name in parity["levels"]}, shapes["speed"].batch_size)
    notes += device_notes(trainings, gains, environment.device_name)
    measured = {name: found["over_baseline"] for name, found in gains["levels"].items() if found["over_baseline"]}
    fastest = max(measured, key=lambda name: measured[name]["ratio"], default=parity["baseline"])
    over = measured.get(fastest)
    return {
        "model": model,
        "baseline": parity["baseline"],
        "fastest": fastest,
        "gain": gain_cell(over),
        "measurable": over is not None and over["verdict"] == "faster",
        "times": f"{over['ratio']:.2f}" if over else MISSING,
        "apart": max(found["largest"] for found in parity["levels"].values()),
        "judged": max(found["steps"] for found in parity["levels"].values()),
        "control": str(Gain(**gains["control"])),
        "estimator": gains["estimator"],
        "peak_source": gains["peak_source"],
        "rounds": gains["rounds"],
        "speed": speed_table(levels, results, gains, parity),
        "training": training_table(levels, results, trial),
        "reasons": reasons(gains, operators),
        "undecided": undecided(gains),
        "costliest": {
            name: [[f"{one['self_ms']:,.1f}", str(one["calls"]), one["name"]] for one in found[:10]]
            for name, found in operators.items()
        },
        "notes": notes + ([verify["note"]] if verify["note"] else []),
        "environment": environment,
        "shapes": shapes,
        "verify": verify,
        "kernels": {name: found for name in parity["levels"] if (found := results[name]["attention_kernel"])},
        "weights": WEIGHTS[verify["weights"]],
        "overfit": overfit,
    }


def markdown(facts: Mapping[str, Any]) -> str:
    """Return ladder.md; it shows the pictures beside it."""
    return templates.get_template("ladder.md").render(**facts, table=markdown_table)


def html(facts: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return ladder.html, which needs nothing but itself; `pictures` are SVG elements by the name in the template."""
    return templates.get_template("ladder.html").render(**facts, pictures=pictures)


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
