"""The CSV is the truth and is there at once; W&B runs are grouped so that they can be compared."""

import contextlib
import csv
import itertools
import re
import subprocess
from urllib.parse import urlsplit

import pytest
import wandb

from gpt2_ladder.config import UserError
from gpt2_ladder.reporting import charts
from gpt2_ladder.running import tracking
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training.metrics import Step
from helpers import processes
from helpers.wandb_server import forget_user, records

STEPS = [Step(0, 10.9, 500.0, 256.0, 1.5, 4), Step(1, 0.1 + 0.2, 400.0, 320.0, 1.25, 4)]


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    forget_user(monkeypatch, tmp_path)
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
    assert path.read_text().splitlines()[0] == "step,loss,step_ms,tokens_per_second,grad_norm,micro_batch"


def test_wandb_holds_the_same_rows_as_the_csv_and_the_config_and_summary(tmp_path):
    with Tracker(tmp_path / "steps.csv", start(shape={"batch_size": 2})) as tracker:
        for step in STEPS:
            tracker.log(step)
        tracker.summarize({"loss_last": 0.3, "note": None})
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    found = records(folder)
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert len(found["history"]) == len(rows) == 2
    for row, record in zip(rows, found["history"], strict=True):
        assert record["step"]["num"] == int(row["step"])
        for name in ("loss", "step_ms", "tokens_per_second"):
            assert record["item"][name] == float(row[name])
    (run,) = found["run"]
    assert (run["project"], run["run_group"], run["job_type"]) == ("gpt2-ladder", "group", "train")
    assert (run["display_name"], run["tags"]) == ("bf16", ["cpu"])
    config = run["config"]["update"]
    assert (config["precision"], config["shape"]) == ("bf16", {"batch_size": 2})
    summary = {key: value for record in found["summary"] for key, value in record["update"].items()}
    assert summary["loss_last"] == 0.3


def test_the_summary_run_holds_gains_and_pictures(tmp_path):
    charts.save_png(charts.memory({"fp32": 3000.0}), tmp_path / "memory.png")
    gains = {"rounds": 8, "levels": {"bf16": {"mfu": 0.5, "over_previous": {"ratio": 1.7, "low": 1.6, "high": 1.8}}}}
    tracking.log_summary(start(), gains, {"memory": tmp_path / "memory.png"})
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    summary = {key: value for record in records(folder)["summary"] for key, value in record["update"].items()}
    assert summary["rounds"] == 8
    assert summary["levels"] == gains["levels"]
    (picture,) = folder.glob("files/media/images/memory*.png")
    assert picture.read_bytes() == (tmp_path / "memory.png").read_bytes()


def test_the_users_project_and_folder_win(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    run = start()
    run.finish()
    assert run.project == "mine"
    assert list(tmp_path.glob("elsewhere/wandb/offline-run-*"))


def test_a_second_run_of_a_level_is_a_run_of_its_own(tmp_path):
    for losses in (STEPS, STEPS[:1]):
        with Tracker(tmp_path / "steps.csv", start()) as tracker:
            for step in losses:
                tracker.log(step)
    lengths = sorted(len(records(folder)["history"]) for folder in tmp_path.glob("wandb/offline-run-*"))
    assert lengths == [1, 2]
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 2


def test_a_key_without_a_network_falls_back_to_offline_and_says_so(tmp_path, monkeypatch, capsys):
    assert tracking.INIT_TIMEOUT_S <= 25  # the fall back itself takes a second: within 30 s in all
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = start()
    run.finish()
    assert run.offline
    assert "W&B cannot be reached or refuses" in capsys.readouterr().out
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_an_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline: known are online, offline, disabled"):
        start()


def test_without_git_the_group_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tracking.run_group("44136fa") == "uncommitted-44136fa"


def test_without_a_key_nobody_is_asked(tmp_path, capsys):
    start().finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert capsys.readouterr().out == f"W&B: {folder}\n"  # and no word of a failure


def test_a_disabled_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start() is None
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_a_key_is_found_where_wandb_login_puts_it(tmp_path, monkeypatch):
    assert not tracking.has_key()
    hosts = (urlsplit(wandb.setup().settings.base_url).netloc, "api.wandb.ai")  # today's, and that of older logins
    for host in hosts:
        for key in ("0" * 40, "malformed"):
            (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")
            assert tracking.has_key()
    (tmp_path / "netrc").write_text(f"machine example.com\n  login user\n  password {'0' * 40}\n")
    assert not tracking.has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.has_key()


def test_the_group_is_the_users_or_the_experiments_or_the_commit_and_environment(monkeypatch):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    assert tracking.run_group("44136fa") == f"{commit.stdout.strip()}-44136fa"
    monkeypatch.setenv("DVC_EXP_NAME", "hazy-loam")
    assert tracking.run_group("44136fa") == "hazy-loam"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert tracking.run_group("44136fa") == "mine"


DIES = """
from dataclasses import replace
from pathlib import Path
import psutil
from test_tracking import STEPS, Tracker, start
with Tracker(Path("steps.csv"), start()) as tracker:
    tracker.log(STEPS[0])
    services = [one for one in psutil.Process().children(recursive=True) if "wandb" in one.name()]
    assert services
    for service in services:
        service.kill()
        service.wait()
    for index in range(1, 200):  # more than a pipe would hold without a reader
        tracker.log(replace(STEPS[1], step=index))
    tracker.summarize({"loss_last": 0.3})
"""


def test_a_wandb_that_dies_in_the_middle_costs_no_row_and_no_training(tmp_path):
    output = processes.run(DIES, tmp_path)
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(200))
    assert output.count("W&B failed") == 1


@pytest.mark.parametrize("what", ["log", "finish"])
def test_whatever_wandb_raises_is_one_line(tmp_path, capsys, what):
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            if what == "log":
                raise BrokenPipeError("gone")

        def finish(self, exit_code: int) -> None:
            raise wandb.errors.CommError("gone")

    with Tracker(tmp_path / "steps.csv", Broken()) as tracker:
        for step in STEPS:
            tracker.log(step)
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("W&B failed") == 1


def test_a_summary_that_wandb_refuses_is_one_line(capsys):
    class Broken(contextlib.nullcontext):
        def __init__(self) -> None:
            super().__init__()
            self.summary: dict[str, object] = {}

        def log(self, _: object) -> None:
            raise BrokenPipeError("gone")

    tracking.log_summary(Broken(), {"rounds": 8}, {})
    line = "W&B failed (BrokenPipeError: gone): continuing without it; results/ has every step\n"
    assert capsys.readouterr().out == line


class Failing:
    """W&B and all that it returns. Its uses are counted; `error` is raised at the one that `fails`, or from it on."""

    errors = wandb.errors

    def __init__(self, error: BaseException, fails: int, later_too: bool) -> None:
        self.error, self.fails, self.later_too, self.uses, self.failed = error, fails, later_too, 0, False

    def use(self, *_: object, **__: object) -> "Failing":
        self.uses += 1
        if self.uses == self.fails or (self.later_too and self.uses > self.fails):
            self.failed = True
            raise self.error
        return self

    __call__ = __enter__ = use

    def __exit__(self, *_: object) -> None:
        self.use()

    def __getattr__(self, _: str) -> "Failing":
        return self.use()

    def __fspath__(self) -> str:
        return "run"


@pytest.mark.parametrize("later_too", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("gone"), wandb.errors.CommError("gone"), SystemExit(3)], ids=repr)
def test_whatever_any_use_of_wandb_raises_costs_no_row_and_no_training(tmp_path, monkeypatch, capsys, error, later_too):
    for fails in itertools.count(1):
        failing = Failing(error, fails, later_too)
        monkeypatch.setattr(tracking, "wandb", failing)
        monkeypatch.setattr(tracking, "read_netrc_auth", failing)
        with Tracker(tmp_path / "steps.csv", start()) as tracker:
            for step in STEPS:
                tracker.log(step)
            tracker.summarize({"loss_last": 0.3})
        tracking.log_summary(start(), {"rounds": 8}, {"memory": tmp_path / "memory.png"})
        assert len((tmp_path / "steps.csv").read_text().splitlines()) == 3
        output = capsys.readouterr().out
        if not failing.failed:
            break
        assert re.search(r"W&B (failed|cannot start|cannot be reached or refuses) \(\w+: (gone|3)\)", output)
    assert fails > 30
    assert "W&B failed" not in output


def test_ctrl_c_in_wandb_stops_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "wandb", Failing(KeyboardInterrupt(), 1, later_too=True))
    with pytest.raises(KeyboardInterrupt):
        start()
    with pytest.raises(KeyboardInterrupt), Tracker(tmp_path / "steps.csv", tracking.wandb) as tracker:
        tracker.log(STEPS[0])


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WANDB_PROJECT", "foo/bar", "UsageError: Invalid project name 'foo/bar'"),
        ("WANDB_BASE_URL", "wandb.corp.example", "ValidationError: .*base_url.*'wandb.corp.example'"),
        ("WANDB_TAGS", "a,", "ValidationError: .*Tag at index 1 is empty"),
    ],
)
def test_settings_of_the_users_that_wandb_refuses_cannot_stop_a_training(
    tmp_path, monkeypatch, capsys, name, value, reason
):
    monkeypatch.setenv(name, value)
    with Tracker(tmp_path / "steps.csv", start()) as tracker:
        tracker.log(STEPS[0])
    line = rf"W&B cannot start \({reason}.*\): recording this run in results/ only\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 2


def test_a_wandb_that_cannot_even_start_offline_leaves_the_csv(tmp_path, monkeypatch, capsys):
    def refuse(**_: object) -> wandb.Run:
        raise OSError("read-only file system")

    monkeypatch.setattr(wandb, "init", refuse)
    with Tracker(tmp_path / "steps.csv", start()) as tracker:
        tracker.log(STEPS[0])
    assert "W&B cannot start (OSError: read-only file system)" in capsys.readouterr().out
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 2
