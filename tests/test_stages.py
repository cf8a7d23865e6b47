"""The small decisions that stages make themselves."""

import math
from pathlib import Path

import pytest

from gpt2_ladder.config import UserError
from gpt2_ladder.metrics import Step
from pipeline import environment, overfit, read_environment, run, trainer, write_json


def test_the_environment_is_found_without_the_commit():
    found = environment.describe()
    assert found.threads >= 1
    assert found.torch.startswith("2.")
    assert "commit" not in found.model_dump()


def test_an_environment_variable_decides_about_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment.describe().threads == 7


def test_a_missing_compiler_is_named():
    assert "no C++ compiler: 'no-such-compiler'" in (environment.compile_problem("no-such-compiler") or "")


def test_missing_python_headers_are_named(monkeypatch, tmp_path):
    assert environment.compile_problem() is None
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python.h is not there" in (environment.compile_problem() or "")


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


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: the disk is full \(.* GiB free here\)"):
        run(lambda: write_json(Path("/dev/full"), {"step": 1}))


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
    class Recorder:
        logged: list = []  # noqa: RUF012  one test's recorder

        def log(self, step):
            self.logged.append(step)

    steps = (Step(index, loss, 1.0, 1.0) for index, loss in enumerate([3.0, math.nan, 2.0]))
    with pytest.raises(UserError, match="bf16: the loss is nan at step 1"):
        trainer.follow(steps, Recorder(), "bf16", total=3)
    assert len(Recorder.logged) == 2
