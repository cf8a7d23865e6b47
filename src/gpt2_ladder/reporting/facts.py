"""Collect the contents of the report for its two templates, ladder.md and ladder.html."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from gpt2_ladder.config import NO_EFFECT, Environment
from gpt2_ladder.measuring.cost import KNOWN_PEAKS
from gpt2_ladder.measuring.gains import MOST_COUNT, NO_GAIN, Gain
from gpt2_ladder.measuring.loss_parity import check_one_count, check_one_environment
from gpt2_ladder.params import Params
from gpt2_ladder.reporting import tables
from gpt2_ladder.reporting.gallery import Machine
from gpt2_ladder.reporting.tables import Metrics, gain_cell, markdown_table

FAST_BF16 = 1.2  # bfloat16 counts as fast if its gain over the baseline is at least this
WEIGHTS = {"openai": "OpenAI's published weights", "stand-in": "random stand-in weights"}
templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.filters["gain_cell"] = gain_cell
templates.globals |= {"table": markdown_table, "no_effect": NO_EFFECT}


def ladder_steps(gains: Metrics) -> list[dict[str, Any]]:
    """Return one row per level: the level's gain, with its interval, multiplied by the tokens/s of the baseline."""
    (baseline, first), *others = gains["levels"].items()
    rate = first["tokens_per_second"]
    ends = {"start": 0, "end": rate, "low": rate, "high": rate}
    steps = [{"level": baseline, **ends, "verdict": "baseline", "label": ""}]
    for name, measured in others:
        low, end, high = (rate * measured["over_baseline"][key] for key in ("low", "ratio", "high"))
        ends = {"start": steps[-1]["end"], "end": end, "low": low, "high": high}
        over = measured["over_previous"]
        steps.append({"level": name, **ends, "verdict": over["verdict"], "label": f"{over['ratio']:.2f} x"})
    return steps


def reasons(gains: Metrics, operators: Mapping[str, Sequence[Metrics]]) -> list[str]:
    """Return one line per measurable gain over the previous level: the operators whose times changed most."""
    lines = []
    for name, measured in gains["levels"].items():
        over = measured["over_previous"]
        if over and over["verdict"] != NO_GAIN and operators.get(name) and operators.get(over["over"]):
            old, new = operator_ms(over["over"], gains, operators), operator_ms(name, gains, operators)
            changed = ", ".join(f"{op} {old[op]:,.0f} -> {new[op]:,.0f} ms" for op in largest_changes(old, new)[:3])
            step_ms = f"{gains['levels'][over['over']]['step_ms']:,.0f} -> {measured['step_ms']:,.0f} ms a step"
            lines.append(f"`{name}`: {step_ms}; {changed}")
    return lines


def operator_ms(level: str, gains: Metrics, operators: Mapping[str, Sequence[Metrics]]) -> defaultdict[str, float]:
    """Return the milliseconds of each operator of `level`, scaled to its median step; 0 for all other operators.

    Compiled graphs are left out: torch numbers their names, so the same graph has another name at another level.
    """
    rows = operators[level]
    scale = gains["levels"][level]["step_ms"] / sum(row["self_ms"] for row in rows)
    named = {row["name"]: scale * row["self_ms"] for row in rows if not row["name"].startswith("Torch-Compiled Region")}
    return defaultdict(float, named)


def largest_changes(old: Mapping[str, float], new: Mapping[str, float]) -> list[str]:
    """Return the names of all operators, sorted by how much their milliseconds changed, the largest change first."""
    changes = {operator: abs(new.get(operator, 0.0) - old.get(operator, 0.0)) for operator in {*old, *new}}
    return sorted(changes, key=lambda operator: (-changes[operator], operator))


def undecided(gains: Metrics) -> list[str]:
    """Return one line per gain that may be noise: how many rounds are needed to measure it."""
    lines = []
    for name, measured in gains["levels"].items():
        by_level = {gain["over"]: gain for gain in (measured["over_previous"], measured["over_baseline"]) if gain}
        for over, gain in by_level.items():
            if gain["verdict"] == NO_GAIN:
                needed, unit = gain["count_to_settle"], "rounds" if gains["processes"] == 1 else "processes"
                rounds = f"about {needed:,} {unit}" if needed else f"over {MOST_COUNT:,} {unit}"
                measured_as = f"{NO_GAIN} in {gains['rounds']} rounds; {rounds} are needed to measure a gain of"
                lines.append(f"`{name}` over `{over}`: {measured_as} {gain['ratio']:.3f}")
    return lines


def micro_batch_notes(results: Mapping[str, Metrics], batch_size: int) -> list[str]:
    """Return notes for the report if speed levels accumulated gradients, because a batch did not fit into memory."""
    rows = {name: result["micro_batch"] for name, result in results.items()}
    smallest = min(rows.values())
    if smallest == batch_size:
        return []
    notes = [f"only {smallest} of the {batch_size} rows of a batch fit into memory: gradients were accumulated"]
    different = f"rows at a time, other levels with {smallest}: do not compare their training tokens/s and memory"
    return notes + [f"`{name}` was trained with {rows[name]} {different}" for name in rows if rows[name] != smallest]


def device_notes(trainings: Mapping[str, Metrics], gains: Metrics, device_name: str) -> list[str]:
    """Return notes for the report if `trainings` used several devices: what the numbers mean."""
    count = trainings["trial"]["devices"]
    if count == 1:
        return []
    trained = f"the speed levels and the trial were trained on {count} devices: training tokens/s are the sum over all"
    notes = [f"{trained} devices; peak memory, gains and the benchmark's tokens/s are those of one device"]
    for name, measured in gains["levels"].items() if device_name in KNOWN_PEAKS else ():
        if measured["mfu"] is not None:
            share = measured["mfu"] / measured["tokens_per_second"] * trainings[name]["tokens_per_second"] / count
            notes.append(f"`{name}` trained at {share:.0%} of the peak of all {count} devices")
    return notes


def largest_gain(gains: Metrics, over: str) -> str:
    """Return the level with the largest measurable gain; `over` is "over_previous" or "over_baseline". "": none."""
    faster = [name for name, row in gains["levels"].items() if row[over] and row[over]["verdict"] == "faster"]
    return max(faster, key=lambda name: gains["levels"][name][over]["ratio"], default="")


def collect(
    params: Params,
    environment: Environment,
    results: Mapping[str, Metrics],
    gains: Metrics,
    parity: Metrics,
    profile: Mapping[str, Sequence[Metrics]],
    device_time: Mapping[str, Metrics],
    trial: Metrics,
    verify: Metrics,
    seconds: Mapping[str, Mapping[str, float]],
    reference: Machine | None,
    **more: Any,
) -> dict[str, Any]:
    """Return the variables of the templates ladder.md and ladder.html; `more` is passed to them unchanged.

    `results` has metrics.json of every level, `seconds` the ledger of every stage, `profile` profile.json, and so on.
    The pages show the gains of `reference` if bfloat16 is not fast here. Raise UserError if the results are from
    different environments or numbers of devices.
    """
    levels, speed = params.levels, params.shape("speed")
    check_one_environment({**results, "trial": trial, "benchmark": gains, "parity": parity}, environment)
    trainings = {**{name: results[name] for name, level in levels.items() if level.group == "speed"}, "trial": trial}
    check_one_count(trainings)
    remarks = {name: metrics["reason"] or metrics["note"] for name, metrics in {**results, "trial": trial}.items()}
    notes = [f"`{name}`: {remark}" for name, remark in remarks.items() if remark]
    notes += micro_batch_notes({name: results[name] for name in parity["levels"]}, speed.batch_size)
    notes += device_notes(trainings, gains, environment.device_name)
    notes += [verify["note"]] if verify["note"] else []
    baseline = parity["baseline"]
    bf16 = next((name for name, level in levels.items() if level.precision in ("bf16", "fp16")), baseline)
    gain = gains["levels"][bf16]["over_baseline"] if bf16 in gains["levels"] else None
    is_fast = gain is not None and gain["verdict"] == "faster" and gain["ratio"] >= FAST_BF16
    return {
        **{**more, "gains": gains, "environment": environment, "verify": verify, "trial": trial},
        **{"model": params.model, "machine": params.machine, "shapes": {"quality": params.quality, "speed": speed}},
        "weights": WEIGHTS[verify["weights"]],
        **{"baseline": baseline, "precision": levels[baseline].precision},
        "fastest": largest_gain(gains, "over_baseline"),
        "largest": largest_gain(gains, "over_previous"),
        **{"bf16": bf16, "half": levels[bf16].precision, "bf16_is_fast": is_fast},
        "reference": None if is_fast or bf16 == baseline else reference,
        "largest_difference": max(level["largest"] for level in parity["levels"].values()),
        "parity_steps": min(level["steps"] for level in parity["levels"].values()),
        "control": str(Gain(**gains["control"])),
        "speed": tables.speed_table(levels, results, gains, parity),
        "training": tables.training_table(levels, results, trial),
        "reasons": reasons(gains, profile),
        "device_time": tables.device_time_table(device_time),
        "seconds": tables.seconds_table(seconds),
        "undecided": undecided(gains),
        "costliest": {
            name: [[f"{row['self_ms']:,.1f}", str(row["calls"]), row["name"]] for row in rows[:10]]
            for name, rows in profile.items()
        },
        "kernels": {name: kernel for name in parity["levels"] if (kernel := results[name]["attention_kernel"])},
        "notes": notes,
    }
