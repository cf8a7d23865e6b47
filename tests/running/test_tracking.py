"""The CSV file has every step at once; W&B has a copy, and no failure of W&B disturbs a training."""

import csv
import itertools
import json
import re
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import wandb

from gpt2_ladder.config import Recipe, UserError
from gpt2_ladder.reporting import charts
from gpt2_ladder.running import run, tracking
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training.metrics import Step
from helpers.common import environment
from helpers.results import PARAMS, gains
from helpers.wandb_server import forget_user, records
from pipeline import train, trial

STEPS = [Step(0, 10.9, 500.0, 256.0, 1.5, 4, 1.0), Step(1, 0.1 + 0.2, 400.0, 320.0, 1.25, 4, 1.5)]


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    forget_user(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def start(**config: object) -> wandb.Run:
    about = {"name": "bf16", "job_type": "train", "tags": ["cpu"], "group": "group"}
    return tracking.start_run({"precision": "bf16", **config}, **about)


def track(path: Path, run: wandb.Run | None, steps: list[Step] = STEPS) -> list[dict[str, str]]:
    """Record `steps` and a summary, and return the rows of the CSV file."""
    with Tracker(path, run, 512) as tracker:
        for step in steps:
            tracker.log(step)
        tracker.log_validation(steps[-1].step, 6.5)
        tracker.summarize({"loss_last": 0.3, "note": None})
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_step_is_in_the_file_before_the_next_one_also_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    path, run = tmp_path / "results" / "steps.csv", start()
    assert run is None
    with Tracker(path, run, 512) as tracker:
        for count, step in enumerate(STEPS, start=1):
            tracker.log(step)
            rows = list(csv.DictReader(path.read_text().splitlines()))
            assert len(rows) == count
            assert float(rows[-1]["loss"]) == step.loss  # not rounded
    assert not list(tmp_path.glob("wandb/*run-*"))
    assert path.read_text().splitlines()[0] == "step,loss,step_ms,tokens_per_second,grad_norm,micro_batch,seconds"


def test_wandb_has_the_rows_of_the_csv_the_config_and_the_summary(tmp_path):
    rows = track(tmp_path / "steps.csv", start(shape={"batch_size": 2}))
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    result = records(folder)
    assert len(result["history"]) == len(rows) == 2
    for row, record in zip(rows, result["history"], strict=True):
        assert record["step"]["num"] == int(row["step"])
        for name in ("loss", "step_ms", "tokens_per_second"):
            assert record["item"][name] == float(row[name])
        assert record["item"]["tokens"] == 512 * (int(row["step"]) + 1)
    assert result["history"][-1]["item"]["val_loss"] == 6.5
    axes = {metric["name"]: metric.get("step_metric") for metric in result["metric"]}
    assert (axes["loss"], axes["val_loss"]) == ("tokens", "tokens")
    (run,) = result["run"]
    assert (run["project"], run["run_group"], run["job_type"]) == ("gpt2-ladder", "group", "train")
    assert (run["display_name"], run["tags"]) == ("bf16", ["cpu"])
    config = run["config"]["update"]
    assert (config["precision"], config["shape"]) == ("bf16", {"batch_size": 2})
    summary = {key: value for record in result["summary"] for key, value in record["update"].items()}
    assert summary["loss_last"] == 0.3


def summarize(levels: dict[str, dict]) -> list[str]:
    """Log the summary of `levels`, and return the names of all summaries' folders."""
    charts.save_png(charts.losses({"fp32": [9.0, 8.0]}, "speed levels"), Path("speed.png"))
    gains = {"rounds": 8, "control": {"ratio": 1.0}, "levels": levels}
    tracking.log_summary(PARAMS, environment(), gains, "<svg>bars</svg>", {"speed": Path("speed.png")})
    return sorted(path.name for path in Path().glob("wandb/offline-run-*-summary-*"))


def test_a_measurement_has_one_summary_with_a_table_a_chart_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    levels = gains()["levels"]
    (name,) = summarize(levels)
    folder = Path("wandb", name)
    result = records(folder)
    assert result["run"][0]["display_name"] == "summary"
    summary = {key: value for record in result["summary"] for key, value in record["update"].items()}
    assert summary["rounds"] == 8
    assert not {"levels", "control"} & set(summary)
    (table,) = (json.loads(path.read_text()) for path in folder.glob("files/media/table/gains*.json"))
    interval = ("ratio", "low", "high", "verdict")
    assert table["columns"] == [
        "level",
        *(f"{side}_{key}" for side in ("over_previous", "over_baseline") for key in interval),
        *("tokens_per_second", "step_ms", "mfu"),
    ]
    assert [row[0] for row in table["data"]] == list(levels)
    assert table["data"][0][1:9] == [None] * 8
    bf16 = levels["bf16"]
    gain = [bf16[side][key] for side in ("over_previous", "over_baseline") for key in interval]
    assert table["data"][2] == ["bf16", *gain, *(bf16[key] for key in ("tokens_per_second", "step_ms", "mfu"))]
    (chart,) = folder.glob("files/media/html/ladder*.html")
    assert "<svg>bars</svg>" in chart.read_text()
    (picture,) = folder.glob("files/media/images/speed*.png")
    assert picture.read_bytes() == Path("speed.png").read_bytes()
    capsys.readouterr()
    assert summarize(levels) == [name]  # the report ran again
    assert re.fullmatch(r"W&B: wandb/ has the run summary-\w{8} already: logging nothing\n", capsys.readouterr().out)
    levels["bf16"]["step_ms"] += 1  # the benchmark was measured again
    assert len(summarize(levels)) == 2
    monkeypatch.setenv("WANDB_MODE", "ofline")
    summarize(levels)
    assert capsys.readouterr().out.splitlines()[-1].startswith("W&B failed (UserError: WANDB_MODE=ofline")


def test_wandb_project_and_wandb_dir_override_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    run = start()
    run.finish()
    assert run.project == "mine"
    assert list(tmp_path.glob("elsewhere/wandb/offline-run-*"))


def test_a_repeated_training_replaces_the_csv_and_adds_a_run(tmp_path):
    assert len(track(tmp_path / "steps.csv", start())) == 2
    assert len(track(tmp_path / "steps.csv", start(), STEPS[:1])) == 1
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_a_key_without_a_network_gives_an_offline_run_and_one_line(tmp_path, monkeypatch, capsys):
    assert tracking.INIT_TIMEOUT_S <= 25  # starting the offline run takes another second: less than 30 s in all
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = start()
    run.finish()
    assert run.offline
    assert "W&B cannot be reached or refused the run" in capsys.readouterr().out
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline: set it to one of online, offline, disabled"):
        start()


def test_without_a_key_a_run_starts_offline_without_a_question(tmp_path, capsys):
    start().finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert capsys.readouterr().out == f"W&B: {folder}\n"


def test_a_key_is_read_from_where_wandb_login_writes_it(tmp_path, monkeypatch):
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


def test_a_resumed_climb_keeps_its_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def commit(path: str) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("new")
        identity = ("-c", "user.name=me", "-c", "user.email=me@example.com")
        for words in (("init", "-q"), ("add", path), (*identity, "commit", "-qm", path)):
            subprocess.run(["git", *words], check=True)

    commit("src/model.py")
    group = tracking.run_group(PARAMS, environment())
    commit("results/gains.json")
    monkeypatch.setenv("DVC_EXP_NAME", "hazy-loam")
    assert tracking.run_group(PARAMS.model_copy(update={"checkpoint_every": 5}), environment()) == group
    assert tracking.run_group(PARAMS.model_copy(update={"seed": 5}), environment()) != group
    assert tracking.run_group(PARAMS, environment(torch="9.9")) != group
    longer = PARAMS.model_copy(update={"recipe": Recipe(model="tiny", batch_size=4, minutes=5.0, betas=(0.9, 0.9))})
    assert tracking.run_group(longer, environment()) == tracking.run_group(longer.for_trial(), environment()) != group
    commit("pipeline/train.py")
    assert tracking.run_group(PARAMS, environment()) != group
    monkeypatch.setenv("PATH", str(tmp_path))  # without Git
    assert re.fullmatch(r"uncommitted-\w{8}", tracking.run_group(PARAMS, environment()))
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert tracking.run_group(PARAMS, environment()) == "mine"


def test_runs_are_named_by_what_changed_and_the_experiment_or_by_the_level(params, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", ".")
    monkeypatch.setenv("DVC_EXP_NAME", "crass-airt")
    settings = params.model_copy(update={"recipe": Recipe(), "vocab_size": 50304})
    for job in (trial.make_job(settings), train.make_job(settings, "fp32")):
        run.start_wandb(job, settings, run.describe(job, settings, environment())).finish()
    started = [records(folder)["run"][0] for folder in Path().glob("wandb/offline-run-*")]
    assert {start["display_name"] for start in started} == {"vocab_size=50304 · crass-airt", "fp32"}
    assert {start["config"]["update"]["experiment"] for start in started} == {"crass-airt"}
    assert len({start["run_group"] for start in started}) == 1
    long = tracking.trial_name({"x" * 200: "y"})
    assert len(long) <= 128
    assert long.endswith(" · crass-airt")
    monkeypatch.delenv("DVC_EXP_NAME")
    assert tracking.trial_name({}) == "trial"


def test_a_wandb_process_that_dies_costs_no_row(tmp_path, capsys):
    with Tracker(tmp_path / "steps.csv", start(), 512) as tracker:
        tracker.log(STEPS[0])
        services = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
        assert services
        for service in services:
            service.kill()
        psutil.wait_procs(services)
        for index in range(1, 200):  # more than a pipe without a reader can hold
            tracker.log(replace(STEPS[1], step=index))
        tracker.summarize({"loss_last": 0.3})
    with suppress(ConnectionError):
        wandb.teardown()
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(200))
    assert capsys.readouterr().out.count("W&B failed") == 1


class Failing:
    """W&B and everything that it returns. It raises `error` at use number `fails`, and at later uses if `later_too`."""

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
def test_whatever_any_use_of_wandb_raises_is_one_line(tmp_path, monkeypatch, capsys, error, later_too):
    for fails in itertools.count(1):
        failing = Failing(error, fails, later_too)
        monkeypatch.setattr(tracking, "wandb", failing)
        monkeypatch.setattr(tracking, "read_netrc_auth", failing)
        assert len(track(tmp_path / "steps.csv", start())) == 2
        tracking.log_summary(PARAMS, environment(), gains(), "<svg/>", {"speed": tmp_path / "speed.png"})
        output = capsys.readouterr().out
        if not failing.failed:
            break
        assert re.search(r"W&B (failed|cannot start|cannot be reached or refused the run) \(\w+: (gone|3)\)", output)
        assert output.count("W&B failed") <= 1
    assert fails > 30
    assert "W&B failed" not in output


def test_ctrl_c_in_wandb_stops_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "wandb", Failing(KeyboardInterrupt(), 1, later_too=True))
    with pytest.raises(KeyboardInterrupt):
        start()
    with pytest.raises(KeyboardInterrupt):
        track(tmp_path / "steps.csv", tracking.wandb)


def test_a_setting_that_wandb_refuses_cannot_stop_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "wandb.corp.example")
    assert len(track(tmp_path / "steps.csv", start())) == 2
    line = r"W&B cannot start \(ValidationError: .*base_url.*\): recording this run in results/ only\n"
    assert re.fullmatch(line, capsys.readouterr().out)
