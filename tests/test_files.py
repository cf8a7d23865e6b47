"""A file is written completely, durably and not through a link; otherwise the previous file stays."""

import errno
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import altair as alt
import pytest
import torch

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.measuring.profiling import profile_step
from gpt2_ladder.model import GPT
from gpt2_ladder.reporting import charts
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import data
from gpt2_ladder.training.metrics import Step
from helpers.common import REPOSITORY, environment, tiny
from pipeline import report, train


def picture() -> alt.Chart:
    return alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(alt.X("x:Q"))


def record(folder: Path) -> None:
    with Tracker(folder / "steps.csv", None, 1) as tracker:
        tracker.log(Step(0, 10.9, 500.0, 256.0, 1.5, 4, 0.5))


def skip(folder: Path) -> None:
    job = train.make_job(params_yaml.load(REPOSITORY / "params.yaml"), "flash")
    replace(job, folder=folder).skip(environment(), "no compiler")


# a writer of every kind of output, and the files that it writes into `folder`
WRITERS = {
    "json": (lambda folder: write_json(folder / "gains.json", {"rounds": 8}), ["gains.json"]),
    "provenance": (
        lambda folder: downloads.write_provenance(folder / "input.txt", "here", "0" * 64),
        ["input.txt.provenance.json"],
    ),
    "shard": (lambda folder: data.write_shard(folder / "train.bin", [1, 2, 3]), ["train.bin", "train.json"]),
    "picture": (lambda folder: charts.save_png(picture(), folder / "ladder.png"), ["ladder.png"]),
    "trace": (
        lambda folder: profile_step(lambda: torch.ones(1), folder / "trace.json"),
        ["trace.json"],
    ),
    "weights": (lambda folder: hub_format.save_gpt(GPT(tiny()), folder), ["config.json", "model.safetensors"]),
    "steps": (record, ["steps.csv"]),
    "skipped level": (skip, ["metrics.json", "steps.csv"]),
}
writers = pytest.mark.parametrize(("write", "names"), WRITERS.values(), ids=WRITERS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@writers
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_into_dvcs_cache_is_replaced_and_not_written_through(folder, tmp_path, write, names, link):
    for name in names:
        (tmp_path / name).write_bytes(b"in the cache")
        (tmp_path / name).chmod(0o444)
        link(folder / name, tmp_path / name)
    write(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == b"in the cache"
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() != b"in the cache"


@writers
def test_the_previous_output_stays_when_the_disk_is_full(folder, monkeypatch, write, names):
    for name in names:
        (folder / name).write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(names, b"before")


@writers
def test_files_have_the_permissions_that_open_gives(folder, write, names):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            write(folder)
        finally:
            os.umask(before)
        assert {(folder / name).stat().st_mode & 0o777 for name in names} == {0o666 & ~mask}


WRITING = re.compile(
    r"\.(write_text|write_bytes|touch|symlink_to|export_chrome_trace|save_pretrained|to_csv|tofile)\(|save_file\(|"
    r"(shutil\.copy\w*|torch\.save|np\.save|json\.dump)\(|open\([^)]*['\"][rbt]*[wax+]|O_(WRONLY|RDWR)"
)


def test_only_these_modules_write_without_files_write():
    """They write into temporary folders, to paths from files.replacing, or to a device, so never through a link."""
    paths = [*(REPOSITORY / "pipeline").rglob("*.py"), *(REPOSITORY / "src/gpt2_ladder").rglob("*.py")]
    names = {path.name for path in paths if WRITING.search(path.read_text())}
    known = {"__init__", "checkpoints", "data", "downloads", "environment", "files", "hub_format"}
    assert names == {f"{name}.py" for name in known | {"check", "launch", "pretrained", "profiling", "tracking"}}


def test_two_files_change_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "train.json", tmp_path / "train.bin"
    first.write_text("old")
    second.write_text("old")
    with pytest.raises(FileNotFoundError), files.replacing(first, second) as (one, _):
        one.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"train.json": "old", "train.bin": "old"}


def test_files_are_synced_before_they_get_their_names(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink()), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append(to), replace(path, to)))
    paths = (tmp_path / "b", tmp_path / "a")
    with files.replacing(*paths) as temporary:
        for path in temporary:
            path.write_text("new")
    assert events == [*temporary, *paths, tmp_path]


def test_a_kill_while_writing_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "gains.json"
    path.write_text("old")
    child = os.fork()
    if not child:
        with files.replacing(path) as (temporary,):
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_text() == "old"
    ignored = subprocess.run(["git", "check-ignore", "-q", ".writing-1"], cwd=REPOSITORY, check=False)
    assert ignored.returncode == 0  # the leftover file must not dirty a clone or change a folder that DVC hashes
    assert ".writing-*" in (REPOSITORY / ".dvcignore").read_text().split()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "Expecting value"),
        (b"[1]", "a list"),
        (b'{"tokens": 1', "delimiter"),
        (b'{"\xff": 1}', "can't decode byte 0xff"),
        (b'{"a": ' * 100_000, "recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_refused_in_one_line(tmp_path, raw, message):
    (tmp_path / "train.json").write_bytes(raw)
    with pytest.raises(UserError, match=rf"train\.json: expected a JSON object: .*{message}") as caught:
        files.read_json(tmp_path / "train.json")
    assert len(str(caught.value).splitlines()) == 1
