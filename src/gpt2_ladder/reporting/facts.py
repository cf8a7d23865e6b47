"""Results -> what the report says, once; the two templates (ladder.md, ladder.html) only lay it out.

Pure: what it is given is what it shows.
"""

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
