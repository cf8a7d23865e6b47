"""Collect what the report states, once; the templates ladder.md and ladder.html only lay it out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from gpt2_ladder.config import Environment, Level, Shape
from gpt2_ladder.measuring.cost import KNOWN_PEAKS
from gpt2_ladder.measuring.gains import NO_GAIN, Gain
from gpt2_ladder.measuring.loss_parity import check_one_count, check_one_environment
from gpt2_ladder.reporting.tables import MISSING, Metrics, gain_cell, markdown_table, speed_table, training_table

WEIGHTS = {"openai": "OpenAI's published weights", "stand-in": "random stand-in weights"}
templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def ladder_steps(gains: Metrics) -> list[dict[str, Any]]:
    """Return the rows of charts.waterfall: the baseline's tokens/s times each level's gain over the baseline."""
    steps: list[dict[str, Any]] = []
    for name, measured in gains["levels"].items():
        over_baseline, over_previous = measured["over_baseline"], measured["over_previous"]
        if over_baseline is None:
            end = baseline = measured["tokens_per_second"]
            step = {"start": 0, "end": end, "low": end, "high": end, "verdict": "baseline", "label": ""}
        else:
            low, end, high = (baseline * over_baseline[key] for key in ("low", "ratio", "high"))
            step = {"start": steps[-1]["end"], "end": end, "low": low, "high": high}
            step |= {"verdict": over_previous["verdict"], "label": f"{over_previous['ratio']:.2f} x"}
        steps.append({"level": name, **step})
    return steps


def reasons(gains: Metrics, operators: Mapping[str, Sequence[Metrics]]) -> list[str]:
    """Return one line for each level measurably faster or slower than the previous one: the operators that changed.

    Only one step per level is profiled and the machine's speed drifts, so operator times are scaled to the median step.
    """
    lines = []
    for name, measured in gains["levels"].items():
        over = measured["over_previous"]
        if over and over["verdict"] != NO_GAIN and operators.get(name) and operators.get(over["over"]):
            old_ms, new_ms = gains["levels"][over["over"]]["step_ms"], measured["step_ms"]
            changes = _largest_changes(scaled(operators[over["over"]], old_ms), scaled(operators[name], new_ms))
            lines.append(f"`{name}`: {old_ms:,.0f} -> {new_ms:,.0f} ms a step; {changes}")
    return lines


def scaled(operators: Sequence[Metrics], step_ms: float) -> dict[str, float]:
    """Return each operator's milliseconds, scaled so that they add up to `step_ms`."""
    total = sum(operator["self_ms"] for operator in operators)
    return {operator["name"]: operator["self_ms"] * step_ms / total for operator in operators}


def _largest_changes(old: Mapping[str, float], new: Mapping[str, float], count: int = 3) -> str:
    """Return one line with the `count` operators whose milliseconds changed most."""
    changes = {name: abs(new.get(name, 0.0) - old.get(name, 0.0)) for name in {*old, *new}}
    largest = sorted(changes, key=lambda name: (-changes[name], name))[:count]
    return ", ".join(f"{name} {old.get(name, 0.0):,.0f} -> {new.get(name, 0.0):,.0f} ms" for name in largest)


def undecided(gains: Metrics) -> list[str]:
    """Return one line for each gain within the noise: how many rounds would be needed to measure it."""
    lines = []
    for name, measured in gains["levels"].items():
        by_level = {gain["over"]: gain for gain in (measured["over_previous"], measured["over_baseline"]) if gain}
        for over, gain in by_level.items():
            if gain["verdict"] == NO_GAIN:
                needed = gain["rounds_to_settle"]
                rounds = "over 10,000 rounds" if needed is None or needed > 10_000 else f"about {needed:,} rounds"
                lines.append(
                    f"`{name}` over `{over}`: {NO_GAIN} in {gains['rounds']} rounds; {rounds} are needed to measure a "
                    f"gain of {gain['ratio']:.3f}"
                )
    return lines


def micro_batch_notes(results: Mapping[str, Metrics], batch_size: int) -> list[str]:
    """Return notes on gradient accumulation where memory did not hold a whole batch of some speed level."""
    rows = {name: result["micro_batch"] for name, result in results.items()}
    smallest = min(rows.values())
    if smallest == batch_size:
        return []
    notes = [f"memory holds {smallest} of the {batch_size} rows of a batch at a time: gradients were accumulated"]
    return notes + [
        f"`{name}` was trained with {count} rows at a time, other levels with {smallest}: compare the benchmark, which "
        f"used {smallest} for all levels, and not the trainings' tokens/s and memory"
        for name, count in rows.items()
        if count != smallest
    ]


def device_notes(trainings: Mapping[str, Metrics], gains: Metrics, device_name: str) -> list[str]:
    """Return notes on `trainings` that ran on several devices, with their share of the devices' known peak."""
    count = trainings["trial"]["devices"]
    if count == 1:
        return []
    notes = [
        f"the speed levels and the trial were trained on {count} devices: their training tokens/s are the sum over all "
        "devices, their peak memory is that of one; gains, and the tokens/s beside them, were measured on one device"
    ]
    for name, measured in gains["levels"].items() if device_name in KNOWN_PEAKS else ():
        if measured["mfu"] is not None:
            share = measured["mfu"] / measured["tokens_per_second"] * trainings[name]["tokens_per_second"] / count
            notes.append(f"`{name}` trained at {share:.0%} of the peak of all {count} devices")
    return notes


def collect(
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
        UserError: a result is from another environment, or from a training on another number of devices.
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
    notes += [verify["note"]] if verify["note"] else []
    over_baseline = {name: row["over_baseline"] for name, row in gains["levels"].items() if row["over_baseline"]}
    fastest = max(over_baseline, key=lambda name: over_baseline[name]["ratio"], default=parity["baseline"])
    gain = over_baseline.get(fastest)
    return {
        "model": model,
        "gains": gains,
        "environment": environment,
        "shapes": shapes,
        "verify": verify,
        "overfit": overfit,
        "weights": WEIGHTS[verify["weights"]],
        "baseline": parity["baseline"],
        "fastest": fastest,
        "gain": gain_cell(gain),
        "measurable": gain is not None and gain["verdict"] == "faster",
        "times": f"{gain['ratio']:.2f}" if gain else MISSING,
        "largest_difference": max(level["largest"] for level in parity["levels"].values()),
        "parity_steps": max(level["steps"] for level in parity["levels"].values()),
        "control": str(Gain(**gains["control"])),
        "speed": speed_table(levels, results, gains, parity),
        "training": training_table(levels, results, trial),
        "reasons": reasons(gains, operators),
        "undecided": undecided(gains),
        "costliest": {
            name: [[f"{row['self_ms']:,.1f}", str(row["calls"]), row["name"]] for row in rows[:10]]
            for name, rows in operators.items()
        },
        "kernels": {name: kernel for name in parity["levels"] if (kernel := results[name]["attention_kernel"])},
        "notes": notes,
    }


def markdown(facts: Mapping[str, Any]) -> str:
    """Render ladder.md, which shows the pictures in its folder."""
    return templates.get_template("ladder.md").render(**facts, table=markdown_table)


def html(facts: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Render ladder.html with the SVG elements in `pictures`, by name; the page loads nothing."""
    return templates.get_template("ladder.html").render(**facts, pictures=pictures)
