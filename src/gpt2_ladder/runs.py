"""W&B runs, of this machine's folder or of a server, side by side in a table like the report's."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from pydantic import ValidationError
from wandb.util import get_core_path

from gpt2_ladder.config import Level, Switches, UserError, shown
from gpt2_ladder.tables import MISSING, TRAINING_COLUMNS, Table, switch_that_changes, training_cells

TRAININGS = ("overfit", "train", "trial")  # the job types of runs that have losses
TIMEOUT_S = 30  # for an answer of the server


@dataclass(frozen=True)
class Run:
    """What a run says of itself; `started` is a time in ISO 8601, `state` finished, or another of W&B's words."""

    where: str
    name: str
    group: str
    job_type: str
    started: str
    state: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


def local(folder: Path, group: str | None) -> Iterator[Run]:
    """Yield the runs that W&B wrote below `folder`, sent or not; of `group`, or of the newest one's; newest first.

    A run whose file cannot be read to its end has another state than finished.
    """
    for path in sorted(folder.glob("*run-*_*-*/run-*.wandb"), key=lambda path: path.parent.name[-24:], reverse=True):
        run = _read(path)
        if group is None and run.state == "finished" and run.job_type in TRAININGS:
            group = run.group
        if group is None or run.group in (group, ""):  # without a group: it could not be read
            yield run


def _read(path: Path) -> Run:
    """Return the run in a .wandb file, from the records that W&B's own reader finds in it."""
    # what `wandb leet inspect` calls, without its import of wandb: 0.05 s a file where that took 1.2
    command = [
        get_core_path(),
        "leet",
        "inspect",
        "--no-observability",
        "--json",
        "--run-file",
        str(path),
        str(path.parent),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    head: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    state = "unfinished"
    if result.returncode:
        state = f"not readable ({shown(' '.join(result.stderr.split())):.200})"
    for record in map(json.loads, result.stdout.splitlines()):
        match record["type"]:
            case "run":
                head |= record["run"]
            case "summary":
                summary |= record["summary"].get("update", {})
            case "exit":
                code = record["exit"].get("exit_code", 0)
                state = "finished" if code == 0 else f"failed, with exit code {code}"
    return Run(
        where=str(path.parent),
        name=head.get("display_name", ""),
        group=head.get("run_group", ""),
        job_type=head.get("job_type", ""),
        started=head.get("start_time", ""),
        state=state,
        config=head.get("config", {}).get("update", {}),
        summary=summary,
    )


def online(project: str, group: str | None) -> Iterator[Run]:
    """Yield the runs of `project`, NAME or OWNER/NAME, on the W&B server; of `group`, or of the newest one's.

    Raises:
        UserError: the server cannot be reached, refuses, or has no such project.
    """
    try:
        api = wandb.Api(timeout=TIMEOUT_S)
        if group is None:
            newest = api.runs(project, {"state": "finished", "jobType": {"$in": TRAININGS}}, "-created_at", per_page=1)
            if (group := next((run.group for run in newest), None)) is None:
                return
        for run in api.runs(project, {"group": group}, "-created_at", lazy=False):
            yield Run(
                where=run.id,
                name=run.display_name,
                group=run.group,
                job_type=run.job_type,
                started=run.created_at,
                state=run.state,
                config=run.config,
                summary=dict(run.summary_metrics),
            )
    except (wandb.errors.Error, ValueError) as error:  # the latter where it knows no such project
        raise UserError(f"W&B, project {project}: {' '.join(str(error).split()):.300}") from None


def table(runs: Iterable[Run], levels: Mapping[str, Level]) -> Table:
    """Return the titles and one row a training, in the order of `levels`; what is no level comes after them.

    What a run changes is said against the row before of `levels`, of the trial against the first of the speed levels.
    """
    order = {name: index for index, name in enumerate(levels)}
    before: dict[str, Level | None] = dict(zip(levels, [None, *levels.values()], strict=False))
    baseline = next((name for name, level in levels.items() if level.group == "speed"), None)
    rows = []
    for run in sorted(runs, key=lambda run: (order.get(run.name, len(order)), run.started)):
        switches, change = _switches(run.config), MISSING
        if switches and run.name in before:
            change = switch_that_changes(switches, before[run.name])
        elif switches and baseline and run.job_type == "trial":
            change = switch_that_changes(switches, levels[baseline], same=f"nothing against {baseline}")
        cells = training_cells({name: run.summary.get(name) for name in TRAINING_COLUMNS})
        rows.append([run.name, change, *cells])
    return [["run", "switch that changes", *(title for title, _ in TRAINING_COLUMNS.values())], *rows]


def _switches(config: Mapping[str, Any]) -> Switches | None:
    """Return the switches in a run's config; None where another version of this project had others."""
    try:
        return Switches.model_validate({name: config.get(name) for name in Switches.model_fields})
    except ValidationError:
        return None
