"""W&B's runs as a table: what lies in this machine's folder, and what a server of ours answers wandb.Api."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import wandb
from conftest import REPOSITORY
from wandb_server import KEY, forget_user, log_in, serve

from gpt2_ladder import params_yaml, tables, tracking
from gpt2_ladder.config import UserError
from gpt2_ladder.metrics import Step
from gpt2_ladder.tracking import Tracker
from pipeline import runs as command

LEVELS = params_yaml.load(REPOSITORY / "params.yaml").levels
FOUND = {
    **{"status": "trained", "note": None, "parameters": 124439808, "loss_first": 10.95, "loss_last": 8.1896},
    **{"val_loss": 8.0076, "bits_per_byte": 3.7303, "tokens_per_second": 279.4},
}
CELLS = ["124,439,808", "10.9500", "8.1896", "8.0076", "3.7303", "279"]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path) -> Iterator[None]:
    """A folder with params.yaml and W&B's folder, and none of the user's settings."""
    forget_user(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    yield
    wandb.teardown()


def record(name: str, job_type: str = "train", group: str = "new", fails: bool = False, **switches: object) -> Path:
    """Record a training offline; return its folder."""
    settings = LEVELS.get(name, LEVELS["fp32"]).model_dump() | switches
    run = tracking.start_run(name, job_type, [], settings, group)
    with suppress(KeyboardInterrupt), Tracker(Path("steps.csv"), run) as tracker:
        tracker.log(Step(0, 10.95, 500.0, 279.4, 1.5, 4))
        if fails:
            raise KeyboardInterrupt
        tracker.summarize(FOUND)
    return Path(run.dir).parent


def leave_killed(year: int) -> Path:
    """Leave the folder of a run as kill -9 does; return it."""
    folder = Path(f"wandb/offline-run-{year}0101_000000-killed00")
    folder.mkdir()
    (folder / "run-killed00.wandb").write_bytes(b"")
    return folder


def rows(output: str) -> list[list[str]]:
    """The cells of the Markdown table in `output`, without titles and rule."""
    table = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("|")]
    assert [title.strip() for title in table[0][2:]] == [title for title, _ in tables.TRAINING_COLUMNS.values()]
    return [[cell.strip() for cell in row] for row in table[2:]]


def test_the_newest_group_of_this_folder_is_the_reports_table(capsys):
    record("fp32", group="old")
    record("trial", "trial", chunked_loss=True)
    record("flash")
    record("bf16")
    failed = record("compile", fails=True)
    summary = tracking.start_run("summary", "report", [], {}, "new")
    tracking.log_summary(summary, {}, {})
    killed = leave_killed(2100)
    capsys.readouterr()
    command.main()
    output = capsys.readouterr()
    assert output.out.startswith("wandb, group new\n")
    assert rows(output.out) == [
        ["bf16", "precision: bf16", *CELLS],
        ["flash", "attention: flash", *CELLS],
        ["trial", "chunked_loss: true", *CELLS],
    ]
    assert output.err.splitlines() == [
        f"{killed}: left out, unfinished",
        f"{failed}: left out, failed, with exit code 1",
    ]


def test_a_killed_run_keeps_wandb_from_sending_others_unless_each_is_sent_alone():
    """Why the README sends them one by one."""
    record("fp32")
    leave_killed(2000)
    one_by_one = "for run in wandb/offline-run-*; do wandb sync $run; done"
    assert one_by_one in (REPOSITORY / "README.md").read_text()
    for command_line, count in (("wandb sync wandb/offline-run-*", 0), (one_by_one, 1)):
        with serve() as (url, sent):
            own = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
            subprocess.run(["sh", "-c", command_line], env={**os.environ, **own}, capture_output=True, check=True)
        named = [one for one in sent if b"mutation UpsertBucket" in one and json.loads(one)["variables"]["displayName"]]
        assert len(named) == count


def test_a_group_is_chosen_and_damaged_files_are_named(capsys):
    record("overfit", "overfit", group="old")
    record("trial", "trial", group="old")
    damaged = record("bf16", group="old") / "damaged.wandb"
    (file,) = damaged.parent.glob("run-*.wandb")
    file.write_bytes(b"old" + file.read_bytes())
    record("fp32")
    capsys.readouterr()
    command.main("--group", "old")
    output = capsys.readouterr()
    assert rows(output.out) == [["overfit", tables.MISSING, *CELLS], ["trial", "nothing against fp32", *CELLS]]
    assert output.err.startswith(f"{damaged.parent}: left out, not readable (Error: ")
    assert len(output.err.splitlines()) == 1
    with pytest.raises(UserError, match="wandb: no finished training of the group other is there"):
        command.main("--group", "other")


def test_what_went_to_a_server_lies_in_this_folder_too(monkeypatch, capsys):
    with serve() as (url, _):
        log_in(monkeypatch, url)
        folder = record("bf16")
        wandb.teardown()
    assert folder.name.startswith("run-")
    capsys.readouterr()
    command.main()
    assert rows(capsys.readouterr().out) == [["bf16", "precision: bf16", *CELLS]]


def test_a_run_of_another_version_has_no_word_on_its_switches(capsys):
    record("bf16", precision="fp8")
    command.main()
    assert rows(capsys.readouterr().out) == [["bf16", tables.MISSING, *CELLS]]


def test_an_empty_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    with pytest.raises(UserError, match="elsewhere/wandb: no finished training is there"):
        command.main()


def node(name: str, job_type: str = "train", group: str = "new", day: int = 1, **changes: object) -> dict:
    """A run as W&B's server describes it: the fields of the query's RunFragment, config and summary as JSON."""
    settings = {key: {"value": value} for key, value in LEVELS.get(name, LEVELS["fp32"]).model_dump().items()}
    return {
        **{"id": f"UnVuOnYxOg=={name}", "name": f"{day:08d}", "displayName": name, "group": group, "jobType": job_type},
        **{"state": "finished", "createdAt": f"2026-01-{day:02d}T00:00:00Z", "config": json.dumps(settings)},
        **{"summaryMetrics": json.dumps(FOUND), "systemMetrics": "{}", "historyKeys": None, "historyLineCount": 1},
        **{"tags": [], "sweepName": None, "commit": None, "readOnly": False, "heartbeatAt": "2026-01-31T00:00:00Z"},
        **{"description": None, "notes": None, "user": {"name": "me", "username": "me"}, "projectId": "1", **changes},
    }


def test_the_servers_runs_make_the_same_table(monkeypatch, capsys):
    old = [node(f"trial-{day}", "trial", "old", day) for day in range(1, 8)]
    new = [node("bf16", day=11), node("fp32", day=10), node("compile", day=12, state="crashed")]
    summary = node("summary", "report", "new", 13)
    with serve(runs=[*old, *new, summary]) as (url, sent):
        log_in(monkeypatch, url)
        command.main("--online")
        output = capsys.readouterr()
        assert output.out.startswith("gpt2-ladder, group new\n")
        assert rows(output.out) == [
            ["fp32", "the speed shape only", *CELLS],
            ["bf16", "precision: bf16", *CELLS],
        ]
        assert "00000012: left out, crashed" in output.err
        command.main("--online", "me/gpt2-ladder", "--group", "old")
        assert [row[0] for row in rows(capsys.readouterr().out)] == [run["displayName"] for run in old]
        with pytest.raises(UserError, match="me/gpt2-ladder: no finished training of the group none is there"):
            command.main("--online", "me/gpt2-ladder", "--group", "none")
        with pytest.raises(UserError, match="W&B, project me/typo: Could not find project typo"):
            command.main("--online", "me/typo")
        assert KEY.encode() not in b"".join(sent)
        wandb.teardown()


def test_a_server_is_not_asked_without_a_key_and_named_where_it_refuses(monkeypatch):
    with pytest.raises(UserError, match="W&B has no key here: run `wandb login`"):
        command.main("--online")
    with serve("401", starts=False) as (url, _):
        log_in(monkeypatch, url)
        with pytest.raises(UserError, match="W&B, project gpt2-ladder: "):
            command.main("--online")
        wandb.teardown()
