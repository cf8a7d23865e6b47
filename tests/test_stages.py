"""The small decisions that stages make themselves."""

import math

import pytest

from gpt2_ladder.config import UserError
from pipeline import environment, overfit, run, write_json


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


def test_a_users_mistake_is_one_line_and_exit_code_one(capsys):
    def main() -> None:
        raise UserError("params.yaml:3: wrong")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: params.yaml:3: wrong\n"


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss_last": math.nan})
    assert not (tmp_path / "metrics.json").exists()
