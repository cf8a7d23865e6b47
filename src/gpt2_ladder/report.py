"""Results -> a table and pictures. Pure: what it is given is what it shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from gpt2_ladder.config import Environment, Level, Shape, Switches

Metrics = Mapping[str, Any]
MISSING = "–"  # noqa: RUF001  an en dash, as tables have it

COLUMNS = {
    "parameters": "{:,}",
    "loss_first": "{:.4f}",
    "loss_last": "{:.4f}",
    "val_loss": "{:.4f}",
    "step_ms": "{:,.0f}",
    "tokens_per_second": "{:,.0f}",
    "compile_seconds": "{:.0f}",
    "peak_memory_mib": "{:,.0f}",
}
UNITS = {
    "loss_first": "loss at step 0",
    "loss_last": "last loss",
    "val_loss": "validation loss",
    "step_ms": "ms per step",
    "tokens_per_second": "tokens/s",
    "compile_seconds": "compilation s",
    "peak_memory_mib": "peak memory MiB",
}


def switch_that_changes(level: Switches, previous: Switches | None) -> str:
    """Return the switches in which `level` differs from `previous`, as `name: value`."""
    if previous is None:
        return "start: PyTorch's defaults"
    changed = [name for name in Switches.model_fields if getattr(level, name) != getattr(previous, name)]
    return ", ".join(f"{name}: {_word(getattr(level, name))}" for name in changed) or "the speed shape only"


def ladder_rows(levels: Mapping[str, Level], results: Mapping[str, Metrics]) -> list[list[str]]:
    """Return one row of text a level, in the ladder's order: name, switch, COLUMNS."""
    rows, previous = [], None
    for name, level in levels.items():
        rows.append([name, switch_that_changes(level, previous), *_cells(results[name])])
        previous = level
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right, columns padded so that a terminal shows it well too."""
    table = [["level", "switch that changes", *(UNITS.get(name, name) for name in COLUMNS)], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    left = 2  # columns of words

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(table[0]), line(rule), *(line(row) for row in table[1:])])


def ladder_markdown(
    levels: Mapping[str, Level],
    results: Mapping[str, Metrics],
    trial: Metrics,
    verify: Metrics,
    overfit: Metrics,
    environment: Environment,
    shapes: Mapping[str, Shape],
) -> str:
    """Return the whole ladder.md."""
    notes = [
        f"- `{name}`: {metrics['reason'] or metrics['note']}"
        for name, metrics in {**results, "trial": trial}.items()
        if metrics["reason"] or metrics["note"]
    ]
    if verify["note"]:
        notes.append(f"- {verify['note']}")
    what = {"openai": "OpenAI's published weights", "stand-in": "random stand-in weights"}
    sizes = "; ".join(
        f"{group} levels {shape.steps} steps of {shape.batch_size} x {shape.block_size} tokens, "
        f"the first {shape.warmup_steps} not timed"
        for group, shape in shapes.items()
    )

    def difference(found: Metrics) -> str:
        return f"largest logit difference {found['max_abs_logit_diff']:.1e} of {found['max_abs_logit']:.1f}"

    return f"""# The ladder

{markdown_table([*ladder_rows(levels, results), ["trial", "the knobs of params.yaml", *_cells(trial)]])}

Tokens/s as measured, one level after the other. The machine's speed drifts meanwhile, so two rows are no gain that one
could quote. Losses are mean cross-entropy in nats; the last loss is that of the last batch, before its update. Peak
memory is torch's on a GPU and the whole process's on a CPU.

![loss by level](loss.png)

![tokens per second by level](tokens_per_second.png)

## Conditions

- Machine: {environment.device_name} ({environment.device}, {environment.threads} threads), torch {environment.torch}, \
Python {environment.python}, {environment.platform}
- Shapes: {sizes}
- Verified against transformers: {what[verify["weights"]]}, {difference(verify)}; a random GPT-2 of our own, \
{difference(verify["random"])}
- Overfitting one batch: loss {overfit["loss_first"]:.4f} at the first step, {overfit["loss_last"]:.4f} at the last of \
{overfit["steps"]}
{chr(10).join(["", "## Notes", "", *notes]) if notes else ""}
"""


def save_loss_chart(steps: Sequence[Metrics], path: Path) -> None:
    """Draw the loss of every step, rows of `level`, `group`, `step` and `loss`, one panel a group, as PNG."""
    order = list(dict.fromkeys(row["level"] for row in steps))
    panels = [
        alt.Chart(alt.Data(values=[row for row in steps if row["group"] == group]), title=f"{group} levels")
        .mark_line(opacity=0.8)
        .encode(
            alt.X("step:Q", title="step"),
            alt.Y("loss:Q", title="training loss in nats", scale=alt.Scale(zero=False)),
            alt.Color("level:N", title="level", sort=order, scale=alt.Scale(domain=order, scheme="tableau10")),
        )
        .properties(width=380, height=300)
        for group in dict.fromkeys(row["group"] for row in steps)
    ]
    alt.hconcat(*panels).save(path, scale_factor=2)


def save_speed_chart(rates: Mapping[str, float], title: str, path: Path) -> None:
    """Draw tokens per second by level, in the ladder's order, from zero, as PNG."""
    base = alt.Chart(alt.Data(values=[{"level": level, "rate": rate} for level, rate in rates.items()]), title=title)
    encoded = base.encode(
        alt.Y("level:N", title=None, sort=list(rates)),
        alt.X("rate:Q", title="tokens/s, median step", scale=alt.Scale(zero=True)),
    )
    labels = encoded.mark_text(align="left", dx=4).encode(alt.Text("rate:Q", format=",.0f"))
    (encoded.mark_bar() + labels).properties(width=520, height=alt.Step(28)).save(path, scale_factor=2)


def _cells(metrics: Metrics) -> list[str]:
    """Return the cells of COLUMNS; a skipped level has dashes."""
    return [
        template.format(metrics[name]) if metrics[name] is not None else MISSING for name, template in COLUMNS.items()
    ]


def _word(value: object) -> str:
    """Write a switch's value as params.yaml has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
