"""Commands: a stage that is started wrong, and make, which passes its variables on as they were typed."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers.climbing import call
from helpers.common import REPOSITORY
from pipeline import run

MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY / "pipeline").with_suffix("").parts)
    for path in REPOSITORY.glob("pipeline/**/*.py")
    if "run(main)" in path.read_text()
)


@pytest.mark.parametrize(
    ("command", "python_path", "module"),
    [
        *((["-m", f"pipeline.{name}", "bf16"], "", name) for name in MODULES),
        (["-mpipeline.train", "bf16"], "", "train"),
        (["-S", "-m", "pipeline.train", "bf16"], "src", "train"),  # -S: no installed packages, no environment
        *((["pipeline/train.py", "bf16"], path, "train") for path in ("", "src")),
        *((["pipeline/tools/plan.py", "bf16"], path, "tools.plan") for path in ("", "src")),
    ],
)
def test_a_stage_that_is_started_wrong_prints_the_command_that_works(command, python_path, module):
    environment = {"PYTHONPATH": python_path, "PATH": os.environ["PATH"]}
    command = [sys.executable, *command]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    right = f"make .venv/installed && source .venv/bin/activate && PYTHONPATH=src python -m pipeline.{module} bf16"
    assert result.stderr == f"error: run this from the top of the repository: {right}\n"
    assert result.returncode == 1


@pytest.mark.parametrize("name", MODULES)
def test_a_stage_without_arguments_refuses_them(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [f"pipeline/{name}.py"])
    main = importlib.import_module(f"pipeline.{name}").main
    if main.__code__.co_flags & inspect.CO_VARARGS:
        return
    with pytest.raises(SystemExit, match=rf"^error: --help x: python -m pipeline\.{name} takes no arguments$"):
        run(main, "--help", "x")


def test_the_command_line_reaches_a_stage():
    command = "env", "PYTHONPATH=src", "python", "-m", "pipeline.environment", "x"
    output = call(REPOSITORY, *command, exit_code=1, stderr=True)
    assert output == "error: x: python -m pipeline.environment takes no arguments\n"


@pytest.fixture
def make(tmp_path):
    """A function that runs make with this repository's Makefile; python and dvc only print their arguments."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/installed").touch()
    for name, prints in (("python", "[%s]"), ("dvc", "")):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\nprintf '{prints}' \"$@\"\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def run_make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = ["make", "--silent", *arguments], {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run_make


ODD = 'It costs $5, $(X) `ls`\n"it\'s" # \\'


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["sample", f"PROMPT={ODD}"], f"sample][--prompt={ODD}]"),
        (["sample", "PROMPT=-x", "OPTIONS=--hub 'a $b' --seed 1"], "sample][--prompt=-x][--hub][a $b][--seed][1]"),
        (["sample"], "sample][--prompt=]"),
        (["plan", "MEMORY=24 GiB"], "plan][--memory=24 GiB]"),
        (["plan", "MEMORY="], "plan][--memory=]"),
        (["plan"], "plan]"),
        (["hellaswag", "MODEL=bob's net", "LIMIT=5 0"], "hellaswag][bob's net][--limit=5 0]"),
        (["hellaswag", "MODEL="], "hellaswag][]"),
        (["share", "FOLDER=../bob's gpt2", "MODEL=$x", "TRIM=1"], "share][--trim][../bob's gpt2][$x]"),
        (["check-mine", f"MINE={ODD}.py:GPT", "OPTIONS=--size 'a b'"], f"check][{ODD}.py:GPT][--size][a b]"),
        (["benchmark", "ROUNDS=7 8"], "benchmark][--rounds][7 8]"),
        (["benchmark", "PROCESSES=3 4"], "benchmark][--rounds][6][--processes][3 4]"),
        (["benchmark"], "benchmark][--rounds][30]"),
        (["quality", "SEEDS=7 8"], "[-m][experiments.quality][--seeds][7 8]"),
        (["gpu", "MINUTES=7 8"], "gpu][7 8]"),
        (["gpu"], "gpu][20]"),
    ],
)
def test_make_passes_a_value_on_as_it_was_typed(make, arguments, printed):
    result = make(*arguments)
    assert result.stdout.removeprefix("[-m][pipeline.").removeprefix("tools.") == printed, result.stderr
    target, *values = arguments
    assert make(target, **dict(value.split("=", 1) for value in values)).stdout == result.stdout  # from the environment


def test_make_try_sets_every_change_and_ends_with_the_experiments_result(make, tmp_path):
    for name, line in (("dvc", "printf '[%s]' \"$@\"; exit $STATUS"), ("git", "echo Experiment: crass-airt")):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    (tmp_path / "results/report").mkdir(parents=True)
    (tmp_path / "results/report/summary.txt").write_text("the result\n")
    change, ran = (
        "CHANGE=precision=bf16  data.path=$(X)*",
        "[exp][run][--set-param=precision=bf16][--set-param=data.path=$(X)*]",
    )
    result = make("try", change, STATUS="0")
    assert result.stdout == f"{ran}\nExperiment: crass-airt\nthe result\n", result.stderr
    failed = make("try", change, STATUS="255")
    assert (failed.stdout, failed.returncode) == (ran, 2)
    assert 'CHANGE is not set; run make try CHANGE="precision=bf16"' in make("try").stderr


@pytest.mark.parametrize("target", ["plan", "hellaswag", "sample"])
def test_make_prints_why_dvc_fails_and_hides_its_other_output(make, tmp_path, target):
    (tmp_path / ".venv/bin/dvc").write_text(f'#!/bin/sh\nexec {sys.executable} -m dvc "$@"\n')
    result = make(target)
    assert "ERROR: you are not inside of a DVC repository" in result.stderr
    assert (result.returncode, result.stdout) == (2, "")
    (tmp_path / ".venv/bin/dvc").write_text("#!/bin/sh\necho Stage x did not change\n")
    assert make(target).stdout.startswith(f"[-m][pipeline.tools.{target}]")


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    old_python = tmp_path / "old-python"
    script = f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); $2"'  # this one claims to be 3.9.2
    old_python.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo Python 3.9.2 && exit\n{script}\n")
    old_python.chmod(0o755)
    output = call(tmp_path, "make", "test", f"PYTHON={old_python}", exit_code=2)
    assert "error: Python 3.9.2: Python 3.11 or newer is needed" in output
    assert not (tmp_path / ".venv").exists()


def test_torch_installed_keeps_the_torch_of_another_environment(tmp_path):
    """Also in later calls, and after a change of requirements.txt; what is wrong is reported before .venv changes."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==0.0.1\n")  # exists nowhere
    (tmp_path / "empty").write_text("#!/bin/sh\n[ $1 != -E ]\n")  # has no torch
    (tmp_path / "empty").chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    for options, error in (
        (("TORCH=2.11", f"PYTHON={sys.executable}"), "error: TORCH=2.11: the only value is installed"),
        (("TORCH=installed", f"PYTHON={tmp_path}/empty"), "/empty has no torch 2.9 or newer: set PYTHON to"),
    ):
        assert error in call(tmp_path, "make", ".venv/installed", *options, exit_code=2)
        assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["installed"]
    call(tmp_path, "make", ".venv/installed", "TORCH=installed", f"PYTHON={sys.executable}")
    find = "import importlib.util as u; print(u.find_spec('torch').origin)"
    for _ in range(2):
        assert call(tmp_path, ".venv/bin/python", "-c", find).strip() == torch.__file__
        (tmp_path / "requirements.txt").touch()
        call(tmp_path, "make", ".venv/installed", f"PYTHON={sys.executable}")
    assert "up to date" in call(tmp_path, "make", ".venv/installed", "TORCH=installed")
