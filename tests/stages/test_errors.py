"""How a stage ends on an error: one line for what the user can fix, a traceback for a bug."""

import errno
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from pipeline import read_environment, run


def test_a_users_mistake_is_one_line_and_exit_code_one():
    def main() -> None:
        raise UserError("params.yaml:3: wrong")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == "error: params.yaml:3: wrong"  # Python prints it to stderr and exits with 1


FULL = (errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(*FULL, "data/.writing-1/x"), "3.0 GiB free in data"),  # a folder that is removed by then
        (OSError(*FULL, "elsewhere/model", None, "data/model"), "3.0 GiB free in data"),  # a copy: from, to
        (RuntimeError(f"g++: fatal error: cc1plus: {FULL[1]}"), "1.0 GiB free in cache"),
        (OSError(*FULL), "1.0 GiB free in cache"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "1.0 GiB free in cache"),  # a quota
    ],
    ids=repr,
)
def test_the_free_space_is_of_the_files_disk_or_else_of_the_fullest_in_use(tmp_path, monkeypatch, error, shown):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "cache")
    for name in ("data", "cache", "results"):
        Path(name).mkdir()
    gib = {Path("data"): 3, Path("cache"): 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=gib.get(path, 60) * 2**30))

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit, match=rf"^error: the disk is full \({shown}\): .*; free some space there and run"):
        run(fail)


def test_a_missing_result_of_another_stage_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: results/environment\.json does not exist"):
        run(read_environment)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_nan_is_never_written_to_a_result(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss_last": math.nan})
    assert not (tmp_path / "metrics.json").exists()
