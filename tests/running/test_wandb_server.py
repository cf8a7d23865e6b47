"""A training with a W&B server that fails, from the start or during the run."""

import csv
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import wandb

from gpt2_ladder.config import Params
from gpt2_ladder.running import tracking
from helpers.common import REPOSITORY
from helpers.trainings import train
from helpers.wandb_server import KEY, forget_user, log_in, serve

STEPS = 60
pytestmark = pytest.mark.slow


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A function that logs this process in to the W&B server at an address."""
    forget_user(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 1)
    return partial(log_in, monkeypatch)


@pytest.mark.parametrize("fault", ["", "500", "reset", "hang", "{}"])
def test_a_server_that_fails_during_a_training_costs_no_row_and_no_time(params, user, tmp_path, capsys, fault):
    document = params.model_dump() | {"checkpoint_every": None}
    document["machines"]["cpu"]["steps"] = STEPS
    long = Params.model_validate(document)
    with serve(fault, starts=True) as (url, sent):
        user(url)
        train(long)
        with suppress(ConnectionError):  # if W&B's process has died
            wandb.teardown()  # W&B does this at the end of a process
    rows = list(csv.DictReader(Path("results/steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert json.loads(Path("results/metrics.json").read_text())["loss_last"] == float(rows[-1]["loss"])
    output = capsys.readouterr().out
    assert f"W&B: {url}" in output  # it started online
    assert len(sent) > 1  # and the fault came later
    if not fault:  # a server that works gets every row
        assert all(f'\\"_step\\":{step}'.encode() in b"".join(sent) for step in range(STEPS))
    assert KEY not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("fault", ["401", "500", "reset", "hang"])
def test_a_server_that_fails_from_the_start_leaves_an_offline_run(user, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1)
    with serve(fault, starts=False) as (url, sent):
        user(url)
        run = tracking.start_run("bf16", "train", ["cpu"], {}, "group")
        run.finish()
        wandb.teardown()
    assert run.offline
    assert sent
    output = capsys.readouterr().out
    assert output.count("W&B cannot be reached or refuses") == 1
    assert KEY not in output
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_wandb_sync_sends_the_other_runs_beside_a_killed_one_only_one_by_one(user, tmp_path, monkeypatch):
    """This is why the README's command loops over the runs."""
    monkeypatch.chdir(tmp_path)
    tracking.start_run("fp32", "train", [], {}, "group").finish()
    killed = tmp_path / "wandb/offline-run-20000101_000000-killed00"
    killed.mkdir()
    (killed / "run-killed00.wandb").write_bytes(b"")
    one_by_one = "for run in wandb/offline-run-*; do wandb sync $run; done"
    assert one_by_one in (REPOSITORY / "README.md").read_text()
    for command_line, count in (("wandb sync wandb/offline-run-*", 0), (one_by_one, 1)):
        with serve() as (url, sent):
            own = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
            subprocess.run(["sh", "-c", command_line], env={**os.environ, **own}, capture_output=True, check=True)
        upserts = [json.loads(request) for request in sent if b"mutation UpsertBucket" in request]
        assert len([upsert for upsert in upserts if upsert["variables"]["displayName"]]) == count
