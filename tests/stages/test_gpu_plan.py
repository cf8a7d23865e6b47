"""make gpu: what fits into the time, what is skipped, and what is stopped. The commands are fakes."""

import re
import shutil
import time
from itertools import pairwise

import psutil
import pytest

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from helpers.climbing import set_param
from helpers.common import REPOSITORY, environment
from pipeline.tools import gpu

TUNED = "dvc repro train@autotune"
# ignores the interrupt as DVC does, and fails if the process that it started has failed
STAGE = """#!/usr/bin/env python3
import signal, subprocess, sys
process = subprocess.Popen(["sleep", "60"])
print(process.pid, file=open("child", "w"))
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(process.wait() != 0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory for a rehearsal, in which every command succeeds at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu.environment, "describe", lambda: environment(device_name="A Processor (R), 2"))
    monkeypatch.setattr(gpu.files, "git", lambda *_: "a1b2c3d")
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    set_param(tmp_path, "rehearsal", True)
    for name in ("dvc", "python"):
        put(tmp_path / name, '#!/bin/sh\necho "$(basename "$0") $*" >> calls\n')
    return tmp_path


def put(path, script):
    path.write_text(script)
    path.chmod(0o755)


def calls(folder) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_everything_runs_in_the_order_of_importance(folder, capsys):
    gpu.main("60")
    gallery, tests = [call for call in calls(folder) if call.startswith("python")]
    dvc = [call for call in calls(folder) if call.startswith("dvc")]
    assert dvc == ["dvc repro overfit probe", TUNED, "dvc repro benchmark", "dvc repro"]
    assert calls(folder)[3] == gallery
    assert gallery.startswith("python -m pipeline.tools.contribute a-processor-r-2 --commit a1b2c3d --date 20")
    assert calls(folder)[-1] == tests == "python -m pytest -m gpu -n 0 tests/test_gpu.py --rehearse"
    head, *plan = capsys.readouterr().out.splitlines()
    assert head == "Plan for 60 minutes, with estimates for an H100 and 16 cores:"
    assert [line.split(" s  ")[1].strip() for line in plan] == calls(folder)
    assert params_yaml.load().machine == "gpu"


def test_what_does_not_fit_is_skipped_unless_dvc_can_continue_it(folder, capsys):
    gpu.main("0.1")
    assert calls(folder) == ["dvc repro overfit probe", "dvc repro benchmark", "dvc repro"]
    assert "autotune" not in params_yaml.load().levels  # its time is kept for the benchmark
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 3
    assert re.search(rf"^gpu: {TUNED}: skipped, because [1-6] s are left$", skipped[0])
    assert re.search(r"^gpu: python -m pytest .*: skipped, because [1-6] s are left$", skipped[2])


def test_a_part_that_fails_ends_the_plan(folder):
    put(folder / "dvc", '#!/bin/sh\necho "dvc $*" >> calls\n[ "$2" = overfit ]\n')
    with pytest.raises(UserError, match=f"^{TUNED}: failed, for the reason above$"):
        gpu.main("60")
    assert calls(folder) == ["dvc repro overfit probe", TUNED]


def test_autotune_is_left_out_if_it_takes_too_long(folder, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(gpu, "run_for", lambda seconds, command: given.update({command: seconds}) or command != TUNED)
    gpu.main("60")
    assert given[TUNED] == 160 < given["dvc repro benchmark"]
    assert f"gpu: {TUNED}: stopped at the end of its time, and left out" in capsys.readouterr().out
    levels = params_yaml.load().levels
    assert "autotune" not in levels
    assert not any(level.autotune for level in levels.values())
    assert levels["chunked"].cuda_graphs
    speed = [level.model_dump() for level in levels.values() if level.group == "speed"]
    changes = [sum(above[key] != level[key] for key in level) for above, level in pairwise(speed)]
    assert set(changes) == {1}  # so that every gain still has one cause
    gpu.main("60")  # in a later call, nothing is tuned


def test_a_stopped_part_leaves_no_process_behind(folder, monkeypatch, capsys):
    put(folder / "dvc", STAGE)
    start = time.monotonic()
    gpu.main("0.03")
    assert time.monotonic() - start < 15
    assert not psutil.pid_exists(int((folder / "child").read_text()))
    first, *rest = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gpu: ")]
    assert first == "gpu: dvc repro overfit probe: stopped at the end of its time"
    assert len(rest) == 5
    assert all(line.endswith("skipped, because 0 s are left") for line in rest)
    assert "autotune" in params_yaml.load().levels


@pytest.mark.parametrize("minutes", ["-1", "0"])
def test_without_time_nothing_runs(folder, minutes):
    gpu.main(minutes)
    assert not (folder / "calls").exists()


def test_a_machine_without_a_gpu_is_refused_before_params_yaml_changes(folder):
    set_param(folder, "rehearsal", False)
    with pytest.raises(UserError, match=r"this machine has no GPU \(A Processor"):
        gpu.main("10")
    assert params_yaml.load().machine == "cpu"
