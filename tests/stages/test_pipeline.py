"""The whole pipeline under real DVC: the results of one climb, and which stages a second run executes."""

import csv
import gzip
import hashlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import metrics
from helpers.climbing import (
    LEVELS,
    NO_SECRET,
    SECRET,
    call,
    get_back,
    read_metrics,
    set_param,
    stages_that_ran,
    wandb_runs,
)
from helpers.wandb_server import KEY, records, serve
from pipeline.tools import share

pytestmark = pytest.mark.slow
LOSSES = ("loss_first", "loss_last", "val_loss")


@pytest.fixture(scope="module")
def clone(clone: Path) -> Path:
    """The copy of the climb, in which make uses the programs on PATH as its environment."""
    (clone / ".venv").mkdir()
    (clone / ".venv/installed").touch()
    return clone


def test_the_climb_runs_every_stage(first_run):
    others = {"environment", "download", "tokenize", "verify", "overfit", "probe"}
    others |= {"parity", "benchmark", "trial", "report"}
    assert stages_that_ran(first_run) == others | {f"train@{level}" for level in LEVELS}


def test_levels_are_trained_and_the_speed_levels_agree(clone):
    results = {level: read_metrics(clone, f"levels/{level}") for level in LEVELS}
    for result in results.values():
        assert set(result) == {"status", "reason", "note", "environment", "devices", *metrics.MEASURED}
    trained = {level for level in LEVELS if results[level]["status"] == "trained"}
    assert trained >= {"untied", "init", "fp32"}  # the others need bf16 and a compiler
    parity = json.loads((clone / "results/parity.json").read_text())
    assert set(parity["levels"]) == trained - {"untied", "init"}
    assert all(len(agreement["differences"]) == 4 for agreement in parity["levels"].values())
    assert any(parity["levels"]["bf16"]["differences"])
    rows = (clone / "results/levels/untied/steps.csv").read_text().splitlines()
    assert len(rows) == 36  # with the titles
    assert float(rows[-1].split(",")[1]) == results["untied"]["loss_last"]


def test_the_trial_computes_what_the_fp32_level_computes(clone):
    trial, fp32 = read_metrics(clone, "trial"), read_metrics(clone, "levels/fp32")
    assert {name: trial[name] for name in LOSSES} == {name: fp32[name] for name in LOSSES}
    assert (trial["changes"], trial["loss_apart"]) == ({}, 0.0)
    assert (trial["gain"], trial["not_measured"]) == (None, "nothing differs from fp32")
    assert (clone / "models/trial/model.safetensors").exists()


def test_bits_per_byte_count_the_bytes_of_the_predicted_tokens(clone, encoding):
    tokens = [json.loads((clone / f"data/{name}.json").read_text())["tokens"] for name in ("train", "val")]
    assert tokens == [301_966, 36_059]  # as in nanoGPT
    predicted = np.fromfile(clone / "data/val.bin", dtype="<u2")[1 : 512 + 1].tolist()
    for name in ("trial", "levels/chunked"):
        result = read_metrics(clone, name)
        bits = result["val_loss"] / math.log(2) * 512
        assert result["bits_per_byte"] == pytest.approx(bits / len(encoding.decode_bytes(predicted)))


def test_every_output_says_that_the_weights_are_a_stand_in(first_run, clone):
    assert json.loads((clone / "results/verify.json").read_text())["weights"] == "stand-in"
    assert "stand-in" in (clone / "data/gpt2/model.safetensors.provenance.json").read_text()
    assert "NOT verified" in (clone / "results/report/ladder.md").read_text()
    assert "NOT verified" in first_run


def test_the_benchmark_measures_the_levels_that_agree_and_the_report_shows_them(clone):
    benchmark, gains = (json.loads((clone / f"results/{name}.json").read_text()) for name in ("benchmark", "gains"))
    parity = json.loads((clone / "results/parity.json").read_text())
    assert list(gains["levels"]) == benchmark["levels"] == list(parity["levels"])
    assert [sorted(row["order"]) for row in benchmark["rounds"]] == [sorted([*benchmark["levels"], "control"])] * 6
    assert all(level["mfu"] > 0 for level in gains["levels"].values())
    bf16 = gains["levels"]["bf16"]["over_previous"]
    gain = f"[{bf16['low']:.2f}, {bf16['high']:.2f}]"  # follows the ratio, or "no measurable gain"
    for page in ("results/report/ladder.md", "results/report/ladder.html"):
        assert gain in (clone / page).read_text()


@pytest.fixture(scope="module")
def wandb_folders(clone) -> dict[Path, dict[str, list[dict]]]:
    """The climb's W&B folders, and the records in each."""
    return {folder: records(folder) for folder in sorted(clone.glob("wandb/offline-run-*"))}


def test_every_training_has_its_own_wandb_run_in_one_group(clone, wandb_folders):
    trained = [level for level in LEVELS if read_metrics(clone, f"levels/{level}")["status"] == "trained"]
    job_types = {"overfit": "overfit", "trial": "trial", "summary": "report", **dict.fromkeys(trained, "train")}
    runs = {}
    for record in wandb_folders.values():
        (run,), (end,) = record["run"], record["exit"]
        assert end.get("exit_code", 0) == 0
        summary = {key: value for row in record["summary"] for key, value in row.get("update", {}).items()}
        runs[run["display_name"]] = (run["job_type"], run["run_group"], summary)
    assert {name: job_type for name, (job_type, _, _) in runs.items()} == job_types
    assert len(wandb_folders) == len(job_types)
    assert len({group for _, group, _ in runs.values()}) == 1
    for name in ("trial", *trained):
        measured, (_, _, summary) = read_metrics(clone, name if name == "trial" else f"levels/{name}"), runs[name]
        assert (summary["loss_last"], summary["val_loss"]) == (measured["loss_last"], measured["val_loss"])


def test_wandb_sync_sends_every_run_once_and_never_as_a_second_run(clone, wandb_folders):
    fields = ("display_name", "run_group", "job_type")
    heads = {folder: record["run"][0] for folder, record in wandb_folders.items()}
    expected = {(folder.name.split("-", 3)[3], *map(head.get, fields)) for folder, head in heads.items()}
    assert len({run_id for run_id, *_ in expected}) == len(wandb_folders) == wandb_runs(clone)
    with serve() as (url, sent):
        sync = "env", f"WANDB_API_KEY={KEY}", f"WANDB_BASE_URL={url}", "wandb", "sync", *map(str, wandb_folders)
        for options in ((), ("--include-synced",)):
            call(clone, *sync, *options)
            runs = [json.loads(request)["variables"] for request in sent if b"mutation UpsertBucket" in request]
            heads = [tuple(run[key] for key in ("name", "displayName", "groupName", "jobType")) for run in runs]
            assert sorted(head for head in heads if head[1]) == sorted(expected)
            assert {run_id for run_id, *_ in heads} == {run_id for run_id, *_ in expected}
            sent.clear()
        call(clone, *sync)  # the runs are marked as sent
        assert not [request for request in sent if b"mutation" in request]


def test_no_file_of_a_climb_contains_a_key_of_its_environment(first_run, clone):
    (git := clone / ".git/config").write_text(git.read_text().replace(SECRET, ""))  # the address of the remote
    contents = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    contents |= {path: gzip.decompress(raw) for path, raw in contents.items() if path.suffix == ".gz"}
    notes = [path for path, content in contents.items() if NO_SECRET.encode() in content]
    assert sum(path.suffix == ".wandb" for path in notes) == wandb_runs(clone)  # so this search finds recorded text
    assert [path for path, content in contents.items() if SECRET.encode() in content] == []
    assert SECRET not in first_run


def test_the_shared_folder_has_the_trials_network_and_the_facts_of_its_run(clone, tmp_path, encoding, monkeypatch):
    assert f"hf upload OWNER/net {tmp_path}/net ." in call(clone, "make", "share", f"FOLDER={tmp_path}/net")
    card, result = (tmp_path / "net/README.md").read_text(), read_metrics(clone, "trial")
    environment = json.loads((clone / "results/environment.json").read_text())
    corpus, train = (clone / f"data/{name}" for name in ("input.txt", "train.bin"))
    commit = call(clone, "git", "rev-parse", "HEAD").strip()
    for fact in (
        *("**4 steps**", "on 512 tokens", "shards: 1, the first with", "2 x 64 tokens; 128 tokens a step"),
        *(f"{result[name]:.4f}" for name in ("loss_first", "loss_last", "val_loss", "bits_per_byte")),
        *(f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in (corpus, train)),
        *(environment["torch"], environment["device_name"], f"git checkout {commit}", '| `precision` | "fp32" |'),
    ):
        assert fact in card
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "net")(torch.tensor([encoding.encode("Before we")])).logits
    ours, _ = hub_format.load_gpt(clone / "models/trial")(torch.tensor([encoding.encode("Before we")]))
    torch.testing.assert_close(logits, ours, rtol=0, atol=2e-5 * ours.abs().max().item())

    monkeypatch.chdir(clone)
    set_param(clone, "precision", "bf16")
    with pytest.raises(UserError, match=r"params\.yaml: modified: precision"):
        share.main("other")
    get_back(clone)
    weights = clone / "models/trial/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # a link: do not write into DVC's cache
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="models/trial;"):
        share.main("other")
    weights.unlink()
    get_back(clone)
    assert not (clone / "other").exists()
    (clone / "src/note.txt").write_text("not committed")
    share.main("other")
    assert "The training cannot be repeated from a commit" in (clone / "other/README.md").read_text()
    shutil.rmtree(clone / "other")
    (clone / "src/note.txt").unlink()


def test_a_second_run_executes_only_the_environment_stage(clone):
    assert call(clone, "git", "status", "--porcelain") == ""
    written = (clone / "dvc.lock").stat().st_mtime_ns
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}
    assert (clone / "dvc.lock").stat().st_mtime_ns == written  # writing it takes half as long as everything else


def test_a_longer_benchmark_stays_until_something_changes(clone):
    output = call(clone, "make", "benchmark", "PROCESSES=2", "ROUNDS=6")
    assert "benchmark: 2 processes take about" in output
    gains, measured = (json.loads((clone / f"results/{name}.json").read_text()) for name in ("gains", "benchmark"))
    assert (gains["processes"], gains["rounds"]) == (2, 12)
    assert [row["process"] for row in measured["rounds"]] == [0] * 6 + [1] * 6
    orders = [[row["order"] for row in measured["rounds"][start : start + 6]] for start in (0, 6)]
    assert orders[0] != orders[1]  # drawn again
    assert "They ran in 2 processes" in (clone / "results/report/ladder.md").read_text()
    assert output.count("checked fp32") == 1
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}
    get_back(clone)


def test_more_seeds_of_the_quality_levels_change_no_stage(clone):
    runs = wandb_runs(clone)
    output = call(clone, "make", "quality", "SEEDS=2")
    assert stages_that_ran(output) == {"environment"}
    losses = json.loads((clone / "results/quality.json").read_text())
    assert losses["1337"] == {name: read_metrics(clone, f"levels/{name}")["loss_last"] for name in ("untied", "init")}
    assert re.search(r"\| untied - init +\| .*\|", output)
    assert wandb_runs(clone) == runs
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}
    (clone / "results/quality.json").unlink()
    get_back(clone)


def test_the_page_with_dvcs_plots_loads_nothing_from_a_server(clone):
    call(clone, "make", "plots")
    page = (clone / "dvc_plots/index.html").read_text()
    assert 'src="http' not in page
    assert "vegaEmbed" in page
    assert '"level": "chunked"' in page
    assert call(clone, "git", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("dvc metrics show", "results/levels/bf16/metrics.json"),
        ("dvc exp show --only-changed", "main|master"),
        ("make plan MEMORY=24GiB", "(?s)this plan uses the CPU's B and T.*torch's tensors"),
        ("make schema", ""),
        ('make sample PROMPT="Once upon a time"', "(?m)^Once upon a time"),
    ],
)
def test_a_command_that_shows_results_works_and_changes_no_file(clone, command, shown):
    assert re.search(shown, call(clone, *shlex.split(command)))
    assert call(clone, "git", "status", "--porcelain") == ""  # the pages and the schema were current


def test_a_retrained_level_updates_parity_and_report(clone):
    assert stages_that_ran(call(clone, "dvc", "repro", "-f", "-s", "train@bf16")) == {"train@bf16"}
    # its losses are the same, so nothing is benchmarked
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment", "parity", "report"}
    get_back(clone)


def test_a_new_download_repairs_dvcs_cache_and_retrains_nothing(clone):
    digest = hashlib.md5((clone / "data/input.txt").read_bytes()).hexdigest()
    cached = clone / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    right = cached.read_bytes()
    cached.chmod(0o644)
    cached.write_bytes(right + b"EVIL LINE\n")
    cached.chmod(0o444)  # DVC trusts a file without write permission
    output = call(clone, "env", "HF_ENDPOINT=http://127.0.0.1:9", "dvc", "repro", "-f", "download")
    assert stages_that_ran(output) == {"download"}
    assert (clone / "data/input.txt").read_bytes() == cached.read_bytes() == right
    # the provenance has another reason for the stand-in
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment", "verify", "report"}
    get_back(clone)


def test_an_edited_row_trains_only_its_level_and_its_results_can_be_committed(clone):
    call(clone, "dvc", "commit", "trial")  # as after a training that torchrun started by hand
    set_param(clone, "levels.init.init", "pytorch")
    ran = stages_that_ran(call(clone, "dvc", "repro"))
    assert ran == {"environment", "probe", "train@init", "parity", "report"}  # no quality level is benchmarked
    assert "levels.init.init" in call(clone, "dvc", "params", "diff")
    assert "results/levels/init/metrics.json" in call(clone, "dvc", "metrics", "diff")
    add = "git add params.yaml dvc.lock pipeline/environment-stage/dvc.lock results"
    call(clone, *add.split())
    call(clone, "git", "commit", "-m", "My machine")
    assert call(clone, "git", "status", "--porcelain") == ""
    call(clone, "git", "reset", "--quiet", "--soft", "HEAD~1")
    call(clone, "git", "reset", "--quiet")
    get_back(clone)


def test_your_own_keys_stay_out_of_git(clone):
    call(clone, "dvc", "remote", "add", "--default", "store", "s3://bucket/path")
    call(clone, "dvc", "remote", "modify", "--local", "store", "profile", "NAME")
    assert "NAME" not in (clone / ".dvc/config").read_text()
    assert call(clone, "git", "status", "--porcelain").split() == ["M", ".dvc/config"]
    (clone / ".dvc/config.local").unlink()
    call(clone, "git", "restore", ".dvc/config")


def test_an_experiment_runs_only_the_trial_and_can_be_removed(clone):
    def cached() -> int:
        return len(list((clone / ".dvc/cache/files").rglob("*")))

    before = cached()
    output = call(clone, "make", "try", "CHANGE=precision=bf16", "--no-print-directory")
    assert "warning: " not in output
    _, name, *lines = output.splitlines()[-5:]
    assert name.removeprefix("Experiment: ") in call(clone, "dvc", "exp", "list", "--name-only").split()
    assert lines == (clone / "results/report/summary.txt").read_text().splitlines()
    assert lines[0].startswith("precision=bf16: ")
    assert lines[0] in (clone / "results/report/ladder.md").read_text().replace("`", "")
    assert stages_that_ran(output) == {"environment", "trial", "report"}
    assert "precision" in call(clone, "dvc", "params", "diff")
    changed = call(clone, "dvc", "metrics", "diff").splitlines()[1:]
    assert {line.split()[0] for line in changed} == {"results/trial/metrics.json"}
    assert len(changed) <= 6
    titles, facts = (
        next(csv.reader(call(clone, "dvc", "exp", "show", "--csv").splitlines())),
        read_metrics(clone, "trial"),
    )
    assert {"loss_apart", "loss", "val"} <= {*titles}  # DVC adds no file's name to them
    rounds = len(facts["measurement"]["rounds"])
    if rounds < 6:  # a busy machine
        assert f"only {rounds} fitted in" in facts["not_measured"]
    else:
        assert facts["gain"]["low"] <= facts["gain"]["ratio"] <= facts["gain"]["high"]
        assert {"gain", "low", "high"} <= {*titles}
    assert call(clone, "git", "diff", "--numstat", "params.yaml").split() == ["1", "1", "params.yaml"]  # still readable
    assert re.search(r"\| precision .*\| bf16 ", call(clone, "make", "show"), re.DOTALL)
    get_back(clone)
    assert cached() > before
    call(clone, "dvc", "exp", "remove", "--all-commits")
    call(clone, "sh", "-c", "yes | dvc gc --workspace --all-branches")
    assert cached() <= before
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}


def test_a_network_that_writes_is_trained_without_any_level_and_continues_after_a_stop(clone):
    # small, as users get it, but for three seconds
    changes = "recipe.minutes=0.05 recipe.lr_warmup_steps=5 recipe.eval_every=20"
    fails = call(clone, "make", "write", f"CHANGE={changes} recipe.learning_rate=1e30", exit_code=2)
    assert "If you stopped it, the same command continues after the last checkpoint." in fails
    output = call(clone, "make", "write", f"CHANGE={changes}", "PROMPT=ROMEO:")
    assert stages_that_ran(output) == {"environment", "trial"}
    assert "steps fit into 0.05 minutes" in output
    assert "ROMEO:" in output
    facts = json.loads((clone / "results/trial/facts.json").read_text())
    assert facts["steps"] >= 20
    assert facts["not_measured"] == "trial.cpu.seconds is 0"
    assert "| small " in call(clone, "make", "show")  # without a gain to sort by
    assert facts["val_loss"] == min(facts["validations"].values())
    config = json.loads((clone / "models/trial/config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_positions"]) == (4, 128, 64)
    get_back(clone)
    (clone / "corpus").mkdir()
    (clone / "corpus/mine.txt").write_text(4 * (clone / "data/input.txt").read_text())
    own = "data.source=text data.path=corpus data.val_tokens=20000"
    output = call(clone, "make", "write", f"CHANGE={own} {changes}")
    assert stages_that_ran(output) == {"environment", "tokenize", "overfit", "train@fp32", "trial"}
    shutil.rmtree(clone / "corpus")
    get_back(clone)
    call(clone, "dvc", "exp", "remove", "--all-commits")


def test_a_level_that_computes_something_else_stops_before_the_benchmark(clone):
    set_param(clone, "levels.bf16.init", "pytorch")
    output = call(clone, "dvc", "repro", exit_code=255)
    assert stages_that_ran(output) == {"environment", "probe", "train@bf16", "parity"}
    get_back(clone)


def test_a_new_level_is_one_row(clone):
    row = params_yaml.load(clone / "params.yaml").levels["bf16"].model_dump()
    set_param(clone, "levels.mine", row | {"attention": "flash"})
    ran = stages_that_ran(call(clone, "dvc", "repro"))
    assert ran == {"environment", "probe", "train@mine", "parity", "benchmark", "report"}
    assert "| mine " in (clone / "results/report/ladder.md").read_text()
    call(clone, "git", "clean", "-dfqx", "results")  # git restore keeps new files, dvc checkout brings steps.csv back
    get_back(clone)
