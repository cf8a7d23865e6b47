"""Write machines/NAME.json, the gallery's file about this machine, from results/."""

import csv
import getpass
import json
import re
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.profiling import Operator
from gpt2_ladder.reporting import gallery
from gpt2_ladder.reporting.gallery import Training
from pipeline import RESULTS, Parser, git, read_json, run

SHARE = 0.005  # of a step's time; operators that take less are summed


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.tools.contribute", description=__doc__)
    parser.add_argument("name", help="name of the file, such as rtx-4090")
    parser.add_argument("--title", help="title of the machine's column, such as 'RTX 4090'")
    parser.add_argument("--note", action="append", default=[], help="something a reader must know; can be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the results of a climb")
    parser.add_argument("--commit", help="commit of this project that was measured (default: the last one of its code)")
    parser.add_argument("--date", help="day of the measurement, YYYY-MM-DD (default: of the results' commit)")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", options.name):
        raise UserError(f"{options.name}: name the machine with a-z, 0-9 and single hyphens, such as rtx-4090")
    if options.commit is None or options.date is None:
        commit, date = committed(options.results)
        options.commit, options.date = options.commit or commit, options.date or date
    benchmark = gallery.read_measurement(options.results / "benchmark.json")
    path = gallery.FOLDER / f"{options.name}.json"
    content = {
        "version": 1,
        "title": options.title or benchmark.environment.device_name,
        "commit": options.commit,
        "date": options.date,
        "benchmark": benchmark.model_dump(),
        "levels": {name: training.model_dump() for name, training in trainings(options.results).items()},
        "notes": options.note,
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    for private in {getpass.getuser(), socket.gethostname()} - {"root"}:
        if re.search(rf"\b{re.escape(private)}\b", text):
            raise UserError(f"'{private}' is the name of this user or machine; remove it from --title or --note")
    gallery.parse(text, path)
    files.write(path, text)
    print(f"{path} is written. Read it, run `make docs`, and open a pull request with all that changed.")


def committed(results: Path) -> tuple[str, str]:
    """Return the last commit that changed the code of `results`, and the day on which the results were committed.

    The commit of the results themselves is only in the contributor's clone. Raise UserError if they are not committed.
    """
    status = git("status", "--porcelain", "--", str(results))
    commit, _, date = git("log", "-1", "--format=%H %cs", "--", str(results / "benchmark.json")).partition(" ")
    if status or not date:
        raise UserError(f"{results}: not committed; commit the results first, or give --commit and --date")
    return git("log", "-1", "--format=%H", commit, "--", "src/*.py", "pipeline/*.py"), date


def trainings(results: Path) -> dict[str, Training]:
    """Return what every level's training and profile showed; what a climb of older code lacks stays empty."""
    parity, losses = read_json(results / "parity.json")["levels"], read_losses(results)
    profile = read_json(results / "profile.json") if (results / "profile.json").exists() else {}
    trained = {}
    for path in sorted(results.glob("levels/*/metrics.json")):
        name, metrics = path.parent.name, read_json(path)
        measured = {field: metrics[field] for field in Training.model_fields if field in metrics}
        trained[name] = Training(
            **{**measured, "note": metrics["reason"] or metrics["note"]},
            losses=tuple(losses.get(name, ())),
            loss_difference=parity[name]["largest"] if name in parity else None,
            operators=costliest(profile.get(name, [])),
        )
    return trained


def read_losses(results: Path) -> dict[str, list[float]]:
    """Return the training losses of every level, from steps.csv or, where they are missing, from the report."""
    losses: dict[str, list[float]] = defaultdict(list)
    trained = {path.parent.name: path for path in results.glob("levels/*/steps.csv")}
    for name, path in (trained or {"": results / "report/losses.csv"}).items():
        for row in csv.DictReader(path.read_text().splitlines()):
            losses[name or row["level"]].append(float(row["loss"]))
    return losses


def costliest(operators: list[dict[str, Any]]) -> tuple[Operator, ...]:
    """Return those of `operators`, the costliest first, that take SHARE of the step, and one row for all others."""
    least = SHARE * sum(row["self_ms"] for row in operators)
    kept = [Operator(**row) for row in operators if row["self_ms"] >= least]
    others = [Operator(**row) for row in operators[len(kept) :]]
    rest = Operator(gallery.OTHERS, sum(row.calls for row in others), sum(row.self_ms for row in others))
    return (*kept, rest) if others else tuple(kept)


if __name__ == "__main__":
    run(main)
