"""Every second of a stage is counted in one phase, from the start of its process to its end."""

import json
import time
from pathlib import Path

import pytest

from gpt2_ladder import ledger
from gpt2_ladder.config import UserError
from helpers.climbing import call
from helpers.processes import IMPORTABLE


def stage(*arguments: str, exit_code: int = 0) -> str:
    """Run a stage in the working directory, as dvc.yaml does."""
    command = "env", f"PYTHONPATH={IMPORTABLE}", "WANDB_MODE=disabled", "python", "-m", *arguments
    return call(Path.cwd(), *command, exit_code=exit_code)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets; the ledger is empty and in the phase `other`."""
    now = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ledger, "seconds", dict.fromkeys(ledger.PHASES, 0.0))
    monkeypatch.setattr(ledger, "_current", "other")
    monkeypatch.setattr(ledger, "_since", 100.0)
    return now


def test_an_inner_phase_interrupts_the_outer_one(clock):
    with ledger.phase("steps"):
        clock[0] += 5
        with ledger.phase("validation"):
            clock[0] += 2
        clock[0] += 1
    clock[0] += 4
    assert ledger.enter("exit") == "other"
    assert {name: spent for name, spent in ledger.seconds.items() if spent} == {
        "steps": 6,
        "validation": 2,
        "other": 4,
    }


def test_after_an_error_the_outer_phase_continues(clock):
    @ledger.phase("data")
    def fail() -> None:
        clock[0] += 3
        raise UserError("no file")

    with pytest.raises(UserError):
        fail()
    assert ledger.enter("exit") == "other"
    assert ledger.seconds["data"] == 3


def test_a_training_writes_where_its_seconds_went(params):
    Path("params.yaml").write_text(params.model_dump_json())
    start = time.perf_counter()
    stage("pipeline.train", "untied")
    seconds = json.loads(Path("results/seconds/train/untied.json").read_text())
    wall = time.perf_counter() - start
    assert list(seconds) == list(ledger.PHASES)
    assert wall / 2 < sum(seconds.values()) < wall
    assert {name for name, spent in seconds.items() if not spent} == {"compile"}


def test_a_stage_that_fails_writes_no_seconds(params):
    Path("params.yaml").write_text(params.model_dump_json())
    stage("pipeline.train", "unknown", exit_code=1)
    assert not Path("results/seconds").exists()


def test_a_command_calls_the_exit_handlers_before_it_ends_at_once(tmp_path):
    lines = (
        "import atexit",
        "from pipeline import run",
        "atexit.register(print, 'handler')",
        "def main(): pass",
        "run(main)",
    )
    (tmp_path / "command.py").write_text("\n".join(lines))
    assert call(tmp_path, "env", f"PYTHONPATH={IMPORTABLE}", "python", "command.py") == "handler\n"
