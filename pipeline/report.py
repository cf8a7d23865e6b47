"""Write results/report: the ladder as Markdown and HTML, charts, all losses. Send it to W&B, print a summary."""

from pathlib import Path
from typing import Any

import altair as alt

from gpt2_ladder import files, params_yaml
from gpt2_ladder.reporting import charts, facts, gallery
from gpt2_ladder.reporting.facts import templates
from gpt2_ladder.running import tracking
from gpt2_ladder.training.metrics import read_losses
from pipeline import GAINS, PARITY, PROFILE, RESULTS, TRIAL_FACTS, read_environment, read_json, read_metrics, run

FOLDER = RESULTS / "report"
TITLES = {"quality": "quality levels", "speed": "speed levels", "trial": "trial"}


def main() -> None:
    params, environment = params_yaml.load(), read_environment()
    results = {name: read_metrics(name) for name in params.levels}
    gains, parity, trial = read_json(GAINS), read_json(PARITY), read_json(TRIAL_FACTS)
    ladder = facts.Ladder(
        levels=params.levels,
        shapes={"quality": params.quality, "speed": params.shape("speed")},
        results=results,
        gains=gains,
        parity=parity,
        operators=read_json(PROFILE),
        environment=environment,
    )
    content = facts.collect(
        ladder,
        model=params.model,
        machine=params.machine,
        trial=trial,
        verify=read_json(RESULTS / "verify.json"),
        overfit=read_json(RESULTS / "overfit.json"),
        explained={path.stem for path in Path("docs/levels").glob("*.md")},  # it only links to them: no dependency
        reference=gallery.read(gallery.FOLDER / "h100-sxm.json"),
    )
    trained = {name: result for name, result in results.items() if result["status"] == "trained"}
    comparable = not any(key.startswith("recipe.") for key in trial["changes"])
    losses: dict[str, list[dict[str, Any]]] = {"quality": [], "speed": [], "trial": []}
    for name, folder in {**{name: RESULTS / "levels" / name for name in trained}, "trial": RESULTS / "trial"}.items():
        rows = [
            {"level": name, "step": step, "loss": loss} for step, loss in enumerate(read_losses(folder / "steps.csv"))
        ]
        losses[params.levels[name].group if name in trained else "trial"] += rows
        if name not in trained and comparable:  # the trial
            losses["speed"] += rows
    differences = [
        {"level": name, "step": step, "loss": difference}
        for name, level in parity["levels"].items()
        for step, difference in enumerate(level["differences"])
    ]
    pictures: dict[str, alt.TopLevelMixin] = {
        "ladder": charts.waterfall(facts.ladder_steps(gains)),
        **{group: charts.losses(rows, TITLES[group]) for group, rows in losses.items() if rows},
        "parity": charts.losses(differences, f"speed levels, difference to {parity['baseline']}", "nats"),
        "memory": charts.memory({name: result["peak_memory_mib"] for name, result in trained.items()}),
    }
    for name, chart in pictures.items():
        charts.save_png(chart, FOLDER / f"{name}.png")
    files.write(FOLDER / "ladder.md", templates.get_template("ladder.md").render(content, pictures=pictures))
    drawings = {name: charts.svg(chart) for name, chart in pictures.items()}
    page = templates.get_template("ladder.html").render(content, pictures=drawings)  # SVG elements: loads no other file
    files.write(FOLDER / "ladder.html", page)
    lines = [f"{group},{row['level']},{row['step']},{row['loss']}" for group, rows in losses.items() for row in rows]
    files.write(FOLDER / "losses.csv", "\n".join(["group,level,step,loss", *lines, ""]))  # for `dvc plots`
    files.write(FOLDER / "summary.txt", summary := templates.get_template("summary.txt").render(content))
    images = {name: FOLDER / f"{name}.png" for name in pictures if name != "ladder"}
    tracking.log_summary(params, environment, gains, drawings["ladder"], images)
    print(summary, end="")


if __name__ == "__main__":
    run(main)
