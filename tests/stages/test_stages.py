"""The small decisions that stages make themselves."""

import errno
import importlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2_ladder import config, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from gpt2_ladder.training import data, metrics
from gpt2_ladder.training.metrics import Step
from helpers.common import REPOSITORY, measurement
from helpers.common import environment as machine
from pipeline import (
    BENCHMARK,
    ENVIRONMENT,
    PROFILE,
    TRACES,
    TRAIN_SHARD,
    environment,
    overfit,
    parity,
    read_environment,
    run,
    trainer,
    write_json,
)
from pipeline import benchmark as benchmark_stage
from pipeline import train as train_stage
from pipeline.tools import compare, plan
from pipeline.train import train


def test_a_level_that_cannot_run_here_says_why_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = params_yaml.load(REPOSITORY / "params.yaml")
    found = environment.describe().model_copy(update={"compile_problem": "no C++ compiler"})
    write_json(ENVIRONMENT, found.model_dump())
    assert train(params, "flash", "train", params.levels["flash"], "speed", tmp_path / "flash") is False
    written = json.loads((tmp_path / "flash" / "metrics.json").read_text())
    assert (written["status"], written["reason"]) == ("skipped", "torch.compile cannot work here: no C++ compiler")
    assert {written[name] for name in metrics.MEASURED} == {None}
    rows = (tmp_path / "flash" / "steps.csv").read_text()
    assert rows == "step,loss,step_ms,tokens_per_second,grad_norm,micro_batch\n"


@pytest.mark.parametrize(("tokens_per_step", "passes"), [(None, 10), (128, 20)])
def test_epochs_seen_are_the_passes_that_the_loader_made(params, monkeypatch, tokens_per_step, passes):
    data.write_shard(TRAIN_SHARD, list(range(125)))  # one batch of 4 x 16 tokens; an epoch leaves the rest out
    document = params.model_dump() | {"checkpoint_every": None}
    document["machines"]["cpu"] |= {"batch_size": 4, "block_size": 16, "steps": 10, "eval_tokens": 64}
    document["recipe"]["tokens_per_step"] = tokens_per_step
    changed = config.Params.model_validate(document)
    loaders, make = [], data.Batches
    monkeypatch.setattr(data, "Batches", lambda *arguments: loaders.append(make(*arguments)) or loaders[-1])
    assert train(changed, "trial", "trial", changed.switches, "speed", Path("results"), changed.recipe)
    assert json.loads(Path("results/metrics.json").read_text())["epochs_seen"] == passes
    assert loaders[0].position == {"epoch": passes, "batch": 0}


@pytest.mark.parametrize("names", [["fp16"], [], ["fp32", "bf16"]])
def test_an_unknown_level_is_named(monkeypatch, names):
    monkeypatch.chdir(REPOSITORY)
    message = f"level '{' '.join(names)}' is not in params.yaml: run python -m pipeline.train LEVEL with one of untied,"
    with pytest.raises(UserError, match=message):
        train_stage.main(*names)


STAGES = sorted(path.stem for path in REPOSITORY.glob("pipeline/*.py") if "run(main)" in path.read_text())


@pytest.mark.parametrize(
    ("command", "found", "module"),
    [
        *((["-m", f"pipeline.{name}", "bf16"], "", name) for name in STAGES),
        (["-mpipeline.train", "bf16"], "", "train"),
        (["-m", "pipeline.train", "bf16"], "src", "train"),  # but without site-packages, as outside an environment
        *(([f"pipeline/{name}.py", "bf16"], found, name) for name in ("environment", "train") for found in ("", "src")),
    ],
)
def test_a_stage_that_is_started_wrong_prints_the_command_that_works(command, found, module):
    environment = {"PYTHONPATH": found, "PATH": os.environ["PATH"]}
    command = [sys.executable, *(["-S"] if found and command[0] == "-m" else []), *command]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    right = f"make .venv/installed && source .venv/bin/activate && PYTHONPATH=src python -m pipeline.{module} bf16"
    assert result.stderr == f"error: run this from the top of the repository: {right}\n"
    assert result.returncode == 1


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_its_arguments_or_refuses_them(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [f"pipeline/{name}.py"])
    main = importlib.import_module(f"pipeline.{name}").main
    if main.__code__.co_flags & inspect.CO_VARARGS:
        return
    with pytest.raises(SystemExit, match=rf"^error: --help x: python -m pipeline\.{name} takes no arguments$"):
        run(main, "--help", "x")


def test_the_command_line_reaches_a_stage():
    environment = {**os.environ, "PYTHONPATH": "src"}
    command = [sys.executable, "-m", "pipeline.environment", "x"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.stderr == "error: x: python -m pipeline.environment takes no arguments\n"


@pytest.fixture
def make(tmp_path):
    """A function that runs make on this repository's Makefile; its python and dvc print their arguments."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/installed").touch()
    for name, prints in (("python", "[%s]"), ("dvc", "")):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\nprintf '{prints}' \"$@\"\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = ["make", "--silent", *arguments], {"PATH": os.environ["PATH"], **variables}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


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
        (["benchmark", "ROUNDS=7 8"], "benchmark][--rounds][7 8]"),
    ],
)
def test_make_hands_a_value_on_as_it_was_typed(make, arguments, printed):
    result = make(*arguments)
    assert result.stdout.removeprefix("[-m][pipeline.") == printed, result.stderr


def test_make_hands_a_value_of_the_environment_on_as_it_is(make):
    assert make("sample", PROMPT="It costs $5").stdout == "[-m][pipeline.tools.sample][--prompt=It costs $5]"


@pytest.mark.parametrize("target", ["plan", "hellaswag", "sample"])
def test_make_shows_why_dvc_stops_and_nothing_else_of_it(make, tmp_path, target):
    (tmp_path / ".venv/bin/dvc").write_text(f'#!/bin/sh\nexec {sys.executable} -m dvc "$@"\n')
    result = make(target)
    assert "ERROR: you are not inside of a DVC repository" in result.stderr
    assert (result.returncode, result.stdout) == (2, "")
    (tmp_path / ".venv/bin/dvc").write_text("#!/bin/sh\necho Stage x did not change\n")
    assert make(target).stdout.startswith(f"[-m][pipeline.{target}]")


def test_an_old_python_is_named_before_anything_is_made(tmp_path):
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    shutil.copy(REPOSITORY / "requirements.txt", tmp_path)
    old_python = tmp_path / "old-python"
    old_python.write_text(  # this interpreter, but it says of itself that it is 3.9.2
        "#!/bin/sh\n"
        "[ $1 = --version ] && echo Python 3.9.2 && exit\n"
        f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); $2"\n'
    )
    old_python.chmod(0o755)
    command = ["make", "test", f"PYTHON={old_python}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "error: Python 3.9.2: Python 3.11 or newer is needed" in result.stdout + result.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (10.0, 0.001, "not within 0.3"),
        (math.nan, 0.001, "not within 0.3"),
        (10.98, 0.006, "over the bound 0.005"),
        (10.98, math.nan, "over the bound 0.005"),
    ],
)
def test_overfitting_fails_loudly(first, last, message):
    overfit.check(10.98, 0.003, 50257, 0.005)
    with pytest.raises(UserError, match=message):
        overfit.check(first, last, 50257, 0.005)


def test_a_users_mistake_is_one_line_and_exit_code_one():
    def main() -> None:
        raise UserError("params.yaml:3: wrong")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == "error: params.yaml:3: wrong"  # Python prints it to stderr and exits with 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, monkeypatch, code):
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=rf"^error: the disk is full \([^ ]* GiB free in {tmp_path}\)"):
        run(lambda: write_json(tmp_path / "metrics.json", {"step": 1}))


FULL = (errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(*FULL, "data/.writing-1/x"), "3.0 GiB free in data"),  # a folder that is removed by then
        (OSError(*FULL, "elsewhere/model", None, "data/model"), "3.0 GiB free in data"),  # a copy: from, to
        (RuntimeError(f"g++: fatal error: cc1plus: {FULL[1]}"), "1.0 GiB free in cache"),
        (OSError(*FULL), "1.0 GiB free in cache"),
    ],
    ids=repr,
)
def test_a_full_disk_is_that_of_the_file_or_else_the_fullest_that_is_used(tmp_path, monkeypatch, error, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "cache")
    for name in ("data", "cache", "results"):
        Path(name).mkdir()
    gib = {Path("data"): 3, Path("cache"): 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=gib.get(path, 60) * 2**30))

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit, match=rf"^error: the disk is full \({named}\): .*; make room there and run"):
        run(fail)


def test_a_stage_out_of_order_names_the_file_that_it_misses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: results/environment\.json is not there"):
        run(read_environment)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss_last": math.nan})
    assert not (tmp_path / "metrics.json").exists()


def test_a_loss_that_is_no_number_stops_the_training_and_is_recorded():
    logged = []
    recorder = SimpleNamespace(log=logged.append)
    steps = (Step(index, loss, 1.0, 1.0, 1.0, 4) for index, loss in enumerate([3.0, math.nan, 2.0]))
    with pytest.raises(UserError, match=r"bf16: at step 1 the loss is nan, the gradient's norm 1\.0; lower models"):
        trainer.follow(steps, recorder, "bf16", total=3)
    assert len(logged) == 2


def test_tf32_left_on_is_found_where_no_loss_could_tell():
    level = params_yaml.load(REPOSITORY / "params.yaml").levels["bf16"]
    parity.check_matmul_precision("bf16", level, "ieee")
    with pytest.raises(
        UserError, match="level 'bf16' was trained with tf32 matrix products where precision bf16 means"
    ):
        parity.check_matmul_precision("bf16", level, "tf32")


def params_with(**changes: object) -> config.Params:
    return params_yaml.load(REPOSITORY / "params.yaml").model_copy(update=changes)


def test_the_baseline_has_a_second_arm_of_its_own():
    params = params_with(model="tiny")
    levels = {name: params.levels[name] for name in ("fp32", "bf16", "padded")}
    arms = benchmark_stage.build_arms(params, {**levels, "control": levels["fp32"]}, torch.device("cpu"), 2)
    assert [arm.name for arm in arms] == ["fp32", "bf16", "padded", "control"]
    assert arms[0].model is not arms[3].model
    assert arms[0].optimizer is arms[1].optimizer is arms[3].optimizer is not arms[2].optimizer


def test_an_allocator_is_measured_in_a_process_of_its_own_on_a_cpu_alone():
    params, device = params_with(model="tiny"), torch.device("cpu")
    levels = {name: params.levels[name] for name in ("chunked", "allocator")}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # nothing is asked of it
        for where, kinds in (("cpu", [Arm, RemoteArm]), ("cuda", [Arm, Arm])):
            arms = benchmark_stage.place_arms(params, levels, machine(device=where), device, 2, process)
            assert [arm.name for arm in arms] == ["chunked", "allocator"]
            assert [type(arm) for arm in arms] == kinds


def test_the_peak_is_the_users_or_a_known_gpus_or_measured_on_a_cpu_or_nobodys():
    params, run_on_cpu = params_with(), measurement(fp32=[300.0] * 3)
    assert benchmark_stage.find_peaks(params, "tf32", run_on_cpu) == [0.2] * 3
    assert benchmark_stage.find_peaks(params, "bf16", run_on_cpu) == [0.4] * 3
    a100 = run_on_cpu.model_copy(update={"environment": machine(device="cuda", device_name="NVIDIA A100-SXM4-80GB")})
    unknown = run_on_cpu.model_copy(update={"environment": machine(device="cuda", device_name="NVIDIA X")})
    assert benchmark_stage.find_peaks(params, "bf16", a100) == [312.0] * 3
    assert benchmark_stage.find_peaks(params, "bf16", unknown) is None
    given = params_with(peak_tflops=config.Peaks(fp32=None, tf32=None, bf16=77.0))
    assert benchmark_stage.find_peaks(given, "bf16", unknown) == [77.0] * 3
    assert benchmark_stage.find_peaks(given, "bf16", run_on_cpu) == [77.0] * 3


def test_gains_come_with_rates_and_shares_of_the_peak():
    params = params_with()
    levels = {name: params.levels[name] for name in ("fp32", "bf16")}
    found = benchmark_stage.summarize(params, levels, measurement(fp32=[3940.0] * 3, bf16=[1970.0] * 3))
    assert found["control"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    bf16 = found["levels"]["bf16"]
    assert bf16["tokens_per_second"] == pytest.approx(512 / 1.97)
    assert bf16["tflops"] == pytest.approx(0.2, rel=1e-2)  # 770 MFLOP a token at T=256, 512 tokens
    assert bf16["mfu"] == pytest.approx(0.5, rel=1e-2)
    assert (bf16["over_previous"]["over"], bf16["over_previous"]["ratio"]) == ("fp32", 2.0)


def test_each_level_leaves_its_costs_and_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = params_with(model="tiny")
    arms = benchmark_stage.build_arms(params, {"fp32": params.levels["fp32"]}, torch.device("cpu"), 1)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    benchmark_stage.profile(arms, (ids, ids), torch.device("cpu"))
    written = json.loads(PROFILE.read_text())
    assert list(written) == ["fp32"]  # not its control
    assert "aten::mm" in {operator["name"] for operator in written["fp32"]}
    assert [path.name for path in TRACES.iterdir()] == ["fp32.json.gz"]


def test_too_few_rounds_are_refused(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match="--rounds 5: at least 6"):
        benchmark_stage.main("--rounds", "5")


def test_two_levels_or_two_machines_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json(BENCHMARK, measurement(fp32=[300.0] * 4, bf16=[150.0] * 4).model_dump())
    compare.main("bf16", "fp32")
    assert "bf16 over fp32: 2.00 [2.00, 2.00] times as fast, faster; A processor, 2 threads" in capsys.readouterr().out
    write_json(tmp_path / "there.json", measurement(fp32=[30.0] * 4, bf16=[10.0] * 4).model_dump())
    compare.main(str(tmp_path / "there.json"))
    assert "| bf16  |             150 |           2.00 [2.00, 2.00] |" in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(BENCHMARK, measurement(fp32=[300.0] * 4).model_dump())
    with pytest.raises(UserError, match="level 'fp16' was not measured; there are fp32"):
        compare.main("fp16", "fp32")
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", ""):
        with pytest.raises(UserError, match=rf"{name or '.'}: not a benchmark\.json of this project"):
            compare.main(name)
    with pytest.raises(UserError, match="0 arguments: give two levels"):
        compare.main()


def test_a_plan_names_what_fits_and_refuses_what_is_no_memory(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    params = params_with(model="tiny")
    monkeypatch.setattr(params_yaml, "load", lambda: params)
    plan.main("--memory", "2GiB")
    table = capsys.readouterr().out
    assert "an NVIDIA GPU with 2GiB free" in table
    assert all(f" {name} " in table for name in ("fp32", "tf32", "bf16", "compile", "flash", "padded"))
    assert (plan.parse_memory("24GiB"), plan.parse_memory("1.5 gb")) == (24 * 2**30, 1_500_000_000)
    for memory in ("much", "", "24", f"{10**400}GiB"):
        with pytest.raises(UserError, match=f"--memory {memory}: write a number and a unit, as in 24GiB"):
            plan.main("--memory", memory)


@pytest.fixture
def two_trained(tmp_path, monkeypatch):
    """A folder in which 8 devices have trained fp32, with two rows at a time, and bf16, with one."""
    monkeypatch.chdir(tmp_path)
    params = params_yaml.load(REPOSITORY / "params.yaml")
    monkeypatch.setattr(params_yaml, "load", lambda: params)
    found = machine()
    write_json(ENVIRONMENT, found.model_dump())
    same = {"environment": found.fingerprint, "devices": 8, "float32_matmul_precision": "ieee"}
    for name, level in params.levels.items():
        if level.group == "speed":
            micro_batch = {"fp32": 2, "bf16": 1}.get(name)
            status = "trained" if micro_batch else "skipped"
            write_json(metrics_of(name), {**same, "status": status, "micro_batch": micro_batch})
            metrics_of(name).with_name("steps.csv").write_text("step,loss\n0,10.9\n1,9.9\n")


def metrics_of(level: str) -> Path:
    return Path(f"results/levels/{level}/metrics.json")


def test_levels_with_other_micro_batches_are_measured_with_the_least(two_trained):
    parity.main()
    assert json.loads(Path("results/parity.json").read_text())["micro_batch"] == 1


def test_losses_of_different_numbers_of_devices_or_machines_are_not_compared(two_trained):
    there = machine(threads=4).fingerprint
    for change, message in (
        ({"devices": 1}, "trained on different numbers of devices: fp32 on 8, bf16 on 1; `dvc repro`"),
        ({"environment": there}, f"the results of bf16 are from environment {there}"),
    ):
        write_json(metrics_of("bf16"), json.loads(metrics_of("fp32").read_text()) | change)
        with pytest.raises(UserError, match=message):
            parity.main()
