"""Gather all results into results/report: a page as Markdown and as HTML, its pictures, a table, a W&B summary run.

And into docs/levels, which holds a page for every level.
"""

import csv
import io
from typing import Any

import altair as alt

from gpt2_ladder import files, params_yaml
from gpt2_ladder.reporting import charts, facts
from gpt2_ladder.running import tracking
from pipeline import RESULTS, levels, read_json, run

FOLDER = RESULTS / "report"


def main() -> None:
    params = params_yaml.load()
    gathered = levels.gather(params)
    results, gains, parity, environment = (gathered[name] for name in ("results", "gains", "parity", "environment"))
    content = facts.collect(
        **gathered,
        model=params.model,
        trial=read_json(RESULTS / "trial" / "metrics.json"),
        verify=read_json(RESULTS / "verify.json"),
        overfit=read_json(RESULTS / "overfit.json"),
    )
    trained = {name: found for name, found in results.items() if found["status"] == "trained"}
    losses: dict[str, list[dict[str, Any]]] = {"quality": [], "speed": []}
    for name in trained:
        rows = csv.DictReader((RESULTS / "levels" / name / "steps.csv").read_text().splitlines())
        losses[params.levels[name].group] += [
            {"level": name, "step": int(row["step"]), "loss": float(row["loss"])} for row in rows
        ]
    pictures: dict[str, alt.TopLevelMixin] = {"ladder": charts.waterfall(facts.ladder_steps(gains))}
    pictures |= {group: charts.losses(rows, f"{group} levels") for group, rows in losses.items() if rows}
    pictures["parity"] = charts.losses(
        [
            {"level": name, "step": step, "loss": difference}
            for name, found in parity["levels"].items()
            for step, difference in enumerate(found["differences"])
        ],
        f"speed levels, difference to {parity['baseline']}",
        "nats",
    )
    pictures["memory"] = charts.memory({name: found["peak_memory_mib"] for name, found in trained.items()})
    for name, chart in pictures.items():
        charts.save_png(chart, FOLDER / f"{name}.png")
    files.write(FOLDER / "ladder.md", facts.markdown(content))
    svgs = {name: charts.svg(chart) for name, chart in pictures.items()}
    files.write(FOLDER / "ladder.html", facts.html(content, svgs))
    write_losses(losses)
    levels.write(gathered)
    settings = {"model": params.model, "machine": params.machine, "environment": environment.model_dump()}
    group = tracking.run_group(environment.fingerprint)
    summary = tracking.start_run("summary", "report", [params.model, environment.device], settings, group)
    tracking.log_summary(summary, gains, {name: FOLDER / f"{name}.png" for name in pictures})


def write_losses(losses: dict[str, list[dict[str, Any]]]) -> None:
    """Write all levels' losses as one long table, which is what `dvc plots` can draw."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["group", "level", "step", "loss"])
    for group, rows in losses.items():
        writer.writerows([group, *row.values()] for row in rows)
    files.write(FOLDER / "losses.csv", table.getvalue())


if __name__ == "__main__":
    run(main)
