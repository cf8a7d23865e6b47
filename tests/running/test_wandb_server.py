"""A W&B server that fails, from the start or during a run, costs neither steps nor results."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import vl_convert
import wandb

from experiments import wandb_chart
from gpt2_ladder.running import tracking
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training.metrics import Step
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


def recorded_steps(path: Path) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader(path.read_text().splitlines())]


@pytest.mark.parametrize("fault", ["", "500", "reset", "hang", "{}"])
def test_a_server_that_fails_after_the_start_costs_no_row(user, tmp_path, capsys, fault):
    with serve(fault, starts=True) as (url, sent):
        user(url)
        with Tracker(tmp_path / "steps.csv", tracking.start_run({}, name="bf16"), 512) as tracker:
            for index in range(STEPS):
                tracker.log(Step(index, 10.9, 500.0, 256.0, 1.5, 4, 1.0))
                time.sleep(0.01)
        with suppress(ConnectionError):  # if W&B's process has died
            wandb.teardown()  # W&B does this at the end of a process
    assert recorded_steps(tmp_path / "steps.csv") == list(range(STEPS))
    output = capsys.readouterr().out
    assert f"W&B: {url}" in output  # it started online
    assert len(sent) > 1  # and the fault came later
    if not fault:  # a server that works gets every row
        assert all(f'\\"_step\\":{step}'.encode() in b"".join(sent) for step in range(STEPS))
    assert KEY not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_training_ends_with_all_its_results_while_the_server_hangs(params, user):
    with serve("hang", starts=True) as (url, sent):
        user(url)
        train(params)
    assert len(sent) > 1
    assert recorded_steps(Path("results/steps.csv")) == list(range(12))
    assert json.loads(Path("results/metrics.json").read_text())["status"] == "trained"


@pytest.mark.parametrize("fault", ["401", "500", "reset", "hang"])
def test_a_server_that_fails_from_the_start_leaves_an_offline_run(user, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1)
    with serve(fault, starts=False) as (url, sent):
        user(url)
        run = tracking.start_run({}, name="bf16")
        run.finish()
        wandb.teardown()
    assert run.offline
    assert sent
    output = capsys.readouterr().out
    assert output.count("W&B cannot be reached or refused the run") == 1
    assert KEY not in output
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_wandb_sync_sends_the_other_runs_beside_a_killed_one_only_one_by_one(user, tmp_path, monkeypatch):
    """This is why the command in docs/wandb.md loops over the runs."""
    monkeypatch.chdir(tmp_path)
    tracking.start_run({}, name="fp32").finish()
    killed = tmp_path / "wandb/offline-run-20000101_000000-killed00"
    killed.mkdir()
    (killed / "run-killed00.wandb").write_bytes(b"")
    one_by_one = "for run in wandb/offline-run-*; do wandb sync $run; done"
    assert one_by_one in (REPOSITORY / "docs/wandb.md").read_text()
    for command_line, count in (("wandb sync wandb/offline-run-*", 0), (one_by_one, 1)):
        with serve() as (url, sent):
            own = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
            subprocess.run(["sh", "-c", command_line], env={**os.environ, **own}, capture_output=True, check=True)
        upserts = [json.loads(request) for request in sent if b"mutation UpsertBucket" in request]
        assert len([upsert for upsert in upserts if upsert["variables"]["displayName"]]) == count


def test_the_custom_chart_is_created_and_draws_the_table(user, capsys):
    with serve() as (url, sent):
        user(url)
        wandb_chart.main()
    (request,) = (json.loads(request) for request in sent if b"mutation CreateCustomChart" in request)
    assert request["variables"]["entity"] == "me"
    assert "created the chart me/gpt2-ladder-gains" in capsys.readouterr().out
    spec = json.loads(re.sub(r"\$\{field:(\w+)\}", r"\1", request["variables"]["spec"]))
    row = {"level": "bf16", "over_previous_ratio": 1.7, "over_previous_low": 1.6, "over_previous_high": 1.8}
    drawing = vl_convert.vegalite_to_svg({**spec, "data": {"values": [{**row, "over_previous_verdict": "faster"}]}})
    for text in ("bf16", "faster"):
        assert f">{text}</text>" in drawing
