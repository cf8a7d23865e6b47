"""The CSV is the truth and is there at once; W&B runs are grouped so that they can be compared."""

import csv
import subprocess
from pathlib import Path

import pytest
import wandb

from gpt2_ladder import tracking
from gpt2_ladder.metrics import Step
from gpt2_ladder.tracking import Tracker

STEPS = [Step(0, 10.9, 500.0, 256.0), Step(1, 0.1 + 0.2, 400.0, 320.0)]


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_GROUP", "DVC_EXP_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def start(**changes: object) -> wandb.Run:
    return tracking.start_run("bf16", "train", ["cpu"], {"precision": "bf16", **changes}, "group")


def test_every_step_is_in_the_file_before_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    path = tmp_path / "results" / "steps.csv"
    with Tracker(path, start()) as tracker:
        for count, step in enumerate(STEPS, start=1):
            tracker.log(step)
            rows = list(csv.DictReader(path.read_text().splitlines()))
            assert len(rows) == count
            assert float(rows[-1]["loss"]) == step.loss  # all digits, nothing rounded
    assert path.read_text().splitlines()[0] == "step,loss,step_ms,tokens_per_second"


def test_without_a_key_the_run_is_offline_and_named_to_compare(tmp_path):
    run = start()
    with Tracker(tmp_path / "steps.csv", run) as tracker:
        for step in STEPS:
            tracker.log(step)
        tracker.summarize({"loss_last": 0.3})
    assert run.offline
    assert (run.project, run.group, run.job_type, run.name) == ("gpt2-ladder", "group", "train", "bf16")
    assert run.config["precision"] == "bf16"
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_a_disabled_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start().finish()
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_a_key_is_found_where_wandb_login_puts_it(tmp_path, monkeypatch):
    assert not tracking._has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert tracking._has_key()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert tracking._has_key()


def test_the_group_is_the_users_or_the_experiments_or_the_commit_and_environment(tmp_path, monkeypatch):
    environment = tmp_path / "environment.json"
    environment.write_text("{}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    assert tracking.run_group(environment) == f"{commit.stdout.strip()}-44136fa"  # sha256 of {} begins so
    monkeypatch.setenv("DVC_EXP_NAME", "hazy-loam")
    assert tracking.run_group(environment) == "hazy-loam"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert tracking.run_group(environment) == "mine"


def test_a_failed_training_closes_the_file_and_fails_the_run(tmp_path):
    class Run:
        exit_code: int | None = None

        def log(self, *_: object, **__: object) -> None: ...

        def finish(self, exit_code: int) -> None:
            self.exit_code = exit_code

    run, path = Run(), Path(tmp_path / "steps.csv")
    tracker = Tracker(path, run)
    tracker.log(STEPS[0])
    tracker.__exit__(RuntimeError, RuntimeError(), None)
    assert run.exit_code == 1
    assert len(path.read_text().splitlines()) == 2
