"""The report stage, run on invented results."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from gpt2_ladder.files import write_json
from helpers.common import REPOSITORY, environment, measurement
from helpers.results import OVERFIT, PARAMS, PARITY, RUN, SKIPPED, TRAINED, TRIAL, VERIFY, gains
from helpers.wandb_server import forget_user
from pipeline import TRIAL_FACTS, report

HEADER = "step,loss,step_ms,tokens_per_second,grad_norm,micro_batch,seconds\n"
STEPS = HEADER + "0,10.95,1,1,1,2\n1,9.5,1,1,1,2\n"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the results of a climb, in which bf16 is not fast."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.copy(REPOSITORY / "params.yaml", "params.yaml")
    Path("docs/levels").mkdir(parents=True)
    Path("docs/levels/fp32.md").touch()
    shutil.copytree(REPOSITORY / "machines", "machines")
    run = measurement(fp32=[300.0] * 4, tf32=[300.0] * 4, bf16=[330.0] * 4, compile=[320.0] * 4)
    contents = {
        "environment": environment().model_dump(),
        "gains": gains(run),
        "parity": PARITY,
        "profile": {},
        "device_time": {},
        "verify": VERIFY,
        "overfit": OVERFIT,
    }
    Path("results").mkdir()
    for name, content in contents.items():
        Path(f"results/{name}.json").write_text(json.dumps(content))
    for name in PARAMS.levels:
        write(f"levels/{name}", trained=name in RUN.levels or PARAMS.levels[name].group == "quality")
    write("trial", trained=True)
    write_json(TRIAL_FACTS, TRIAL)
    return tmp_path / "results"


def write(name: str, trained: bool) -> None:
    """Write the results of one training."""
    folder = Path("results", name)
    write_json(folder / "metrics.json", TRAINED if trained else SKIPPED)
    (folder / "steps.csv").write_text(STEPS if trained else HEADER)


@pytest.mark.parametrize(("changes", "groups"), [({"precision": "bf16"}, 2), ({"recipe.steps": "100"}, 1)])
def test_the_trial_is_among_the_speed_levels_only_if_it_can_be_compared(results, changes, groups):
    write_json(TRIAL_FACTS, {**TRIAL, "changes": changes})
    report.main()
    rows = list(csv.DictReader((results / "report/losses.csv").read_text().splitlines()))
    expected = {("quality", name) for name in ("untied", "tied", "init")} | {("speed", name) for name in RUN.levels}
    expected |= {("trial", "trial")} | ({("speed", "trial")} if groups == 2 else set())
    assert {(row["group"], row["level"]) for row in rows} == expected
    assert [row["loss"] for row in rows if row["level"] == "trial"] == groups * ["10.95", "9.5"]
    assert ">trial</text>" in (results / "report/ladder.html").read_text()
    # the same files for every change: Git would keep a file that only some trials write
    assert (results / "report/trial.png").exists()


def test_the_report_shows_the_gallerys_h100(results):
    report.main()
    page = (results / "report/ladder.md").read_text()
    assert "On an H100" in page
    assert "[fp32](../../docs/levels/fp32.md)" in page


def test_the_last_three_lines_are_the_trials_result(results, capsys):
    report.main()
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "precision=bf16: 2.00 [1.99, 2.01] times as fast as fp32, losses within 0.0006 nats"
    assert (results / "report/summary.txt").read_text().splitlines() == lines


def test_skipped_trainings_leave_no_empty_picture(results, capsys):
    missing = ("gain", "measurement", "loss_apart")
    write_json(TRIAL_FACTS, {**TRIAL, **SKIPPED, **dict.fromkeys(missing), "not_measured": "no compiler"})
    for name in ("levels/untied", "levels/tied", "levels/init", "trial"):
        write(name, trained=False)
    report.main()
    assert not (results / "report/quality.png").exists()
    for page in ("ladder.md", "ladder.html"):
        text = (results / "report" / page).read_text()
        assert "quality.png" not in text
        assert ">trial</text>" not in text
    assert "precision=bf16: not trained (no compiler)\n" in capsys.readouterr().out


def test_only_a_new_measurement_is_a_new_summary_in_wandb(results, monkeypatch):
    forget_user(monkeypatch, results)
    measured = json.loads((results / "gains.json").read_text())
    for rounds, count in ((4, 1), (4, 1), (5, 2)):
        write_json(results / "gains.json", {**measured, "rounds": rounds})
        report.main()
        folders = list(Path().glob("wandb/offline-run-*-summary-*"))
        assert len(folders) == count
    assert "<svg" in next(folders[0].glob("files/media/html/ladder*")).read_text()
