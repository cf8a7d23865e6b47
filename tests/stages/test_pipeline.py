"""What a climb of the real pipeline under real DVC leaves behind, and what a second one runs."""

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
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import metrics
from helpers.climbing import NO_SECRET, SECRET, call, get_back, read_metrics, set_param, stages_that_ran, wandb_runs
from helpers.common import REPOSITORY
from helpers.wandb_server import KEY, records, serve

LEVELS = list(params_yaml.load(REPOSITORY / "params.yaml").levels)


@pytest.fixture(scope="module")
def clone(clone: Path) -> Path:
    """The copy, in which make finds its environment: what it needs is on PATH already."""
    (clone / ".venv").mkdir()
    (clone / ".venv/installed").touch()
    return clone


def test_every_stage_runs(first_run):
    others = {"environment", "download", "tokenize", "verify", "overfit", "probe"}
    others |= {"parity", "benchmark", "trial", "report"}
    assert stages_that_ran(first_run) == others | {f"train@{level}" for level in LEVELS}


def test_what_can_run_here_is_trained_and_the_speed_levels_agree(clone):
    found = {level: read_metrics(clone, f"levels/{level}") for level in LEVELS}
    for level_metrics in found.values():
        assert set(level_metrics) == {"status", "reason", "note", "environment", "devices", *metrics.MEASURED}
    trained = {level for level in LEVELS if found[level]["status"] == "trained"}
    assert trained >= {"untied", "tied", "init", "fp32", "tf32"}  # the others need a compiler, or bf16
    assert found["tf32"]["note"]
    assert (found["fp32"]["float32_matmul_precision"], found["tf32"]["float32_matmul_precision"]) == ("ieee", "tf32")
    parity = json.loads((clone / "results/parity.json").read_text())
    assert set(parity["levels"]) == trained - {"untied", "tied", "init"}
    assert all(len(agreement["differences"]) == 4 for agreement in parity["levels"].values())
    assert set(parity["levels"]["tf32"]["differences"]) == {0.0}  # it has no effect on a CPU
    assert any(parity["levels"]["padded"]["differences"])
    rows = (clone / "results/levels/init/steps.csv").read_text().splitlines()
    assert len(rows) == 51
    assert float(rows[-1].split(",")[1]) == found["init"]["loss_last"]


def test_the_trial_starts_out_as_the_fp32_level(clone):
    trial, fp32 = read_metrics(clone, "trial"), read_metrics(clone, "levels/fp32")
    for name in ("loss_first", "loss_last", "val_loss"):
        assert trial[name] == fp32[name]
    assert (clone / "models/trial/model.safetensors").exists()


def test_bits_per_byte_are_of_the_tokens_that_validation_predicts(clone, encoding):
    predicted = np.fromfile(clone / "data/val.bin", dtype="<u2")[1 : 512 + 1].tolist()
    for name in ("trial", "levels/padded"):
        found = read_metrics(clone, name)
        bits = found["val_loss"] / math.log(2) * 512
        assert found["bits_per_byte"] == pytest.approx(bits / len(encoding.decode_bytes(predicted)))


def test_the_shards_are_those_of_nanogpt(clone):
    tokens = [json.loads((clone / f"data/{name}.json").read_text())["tokens"] for name in ("train", "val")]
    assert tokens == [301_966, 36_059]


def test_the_stand_in_is_called_one_everywhere(first_run, clone):
    assert json.loads((clone / "results/verify.json").read_text())["weights"] == "stand-in"
    assert "stand-in" in (clone / "data/gpt2/model.safetensors.provenance.json").read_text()
    assert "NOT verified" in (clone / "results/report/ladder.md").read_text()
    assert "NOT verified" in first_run


def test_the_benchmark_measures_what_agrees_and_the_report_shows_it(clone):
    benchmark, gains = (json.loads((clone / f"results/{name}.json").read_text()) for name in ("benchmark", "gains"))
    parity = json.loads((clone / "results/parity.json").read_text())
    assert list(gains["levels"]) == benchmark["levels"] == list(parity["levels"])
    assert [sorted(one["order"]) for one in benchmark["rounds"]] == [sorted([*benchmark["levels"], "control"])] * 6
    assert all(found["mfu"] > 0 for found in gains["levels"].values())
    bf16 = gains["levels"]["bf16"]["over_previous"]
    gain = f"[{bf16['low']:.2f}, {bf16['high']:.2f}]"  # before it stands the ratio, or "no measurable gain"
    for page in ("results/report/ladder.md", "results/report/ladder.html", "docs/levels/bf16.md"):
        assert gain in (clone / page).read_text()


@pytest.fixture(scope="module")
def wandb_folders(clone) -> dict[Path, dict[str, list[dict]]]:
    """W&B's folders of the climb, and the records in each."""
    return {folder: records(folder) for folder in sorted(clone.glob("wandb/offline-run-*"))}


def test_every_training_has_a_run_of_its_own_and_all_are_one_group(clone, wandb_folders):
    trained = [level for level in LEVELS if read_metrics(clone, f"levels/{level}")["status"] == "trained"]
    kinds = {"overfit": "overfit", "trial": "trial", "summary": "report", **dict.fromkeys(trained, "train")}
    runs = {}
    for found in wandb_folders.values():
        (run,), (end,) = found["run"], found["exit"]
        assert end.get("exit_code", 0) == 0
        summary = {key: value for record in found["summary"] for key, value in record.get("update", {}).items()}
        runs[run["display_name"]] = (run["job_type"], run["run_group"], summary)
    assert {name: kind for name, (kind, _, _) in runs.items()} == kinds
    assert len(wandb_folders) == len(kinds)
    assert len({group for _, group, _ in runs.values()}) == 1
    for name in ("trial", *trained):
        measured, (_, _, summary) = read_metrics(clone, name if name == "trial" else f"levels/{name}"), runs[name]
        assert (summary["loss_last"], summary["val_loss"]) == (measured["loss_last"], measured["val_loss"])


def test_wandb_sync_sends_every_run_once_and_sent_again_it_is_the_same_run(clone, wandb_folders):
    fields = ("display_name", "run_group", "job_type")
    heads = {folder: found["run"][0] for folder, found in wandb_folders.items()}
    expected = {(folder.name.split("-")[-1], *map(head.get, fields)) for folder, head in heads.items()}
    assert len({run_id for run_id, *_ in expected}) == len(wandb_folders) == wandb_runs(clone)
    folders = list(map(str, wandb_folders))
    for again in ((), ("--include-synced",)):
        with serve() as (url, sent):
            send = "env", f"WANDB_API_KEY={KEY}", f"WANDB_BASE_URL={url}", "wandb", "sync"
            call(clone, *send, *again, *folders)
            upserted = [json.loads(one)["variables"] for one in sent if b"mutation UpsertBucket" in one]
            heads = [tuple(one[key] for key in ("name", "displayName", "groupName", "jobType")) for one in upserted]
            assert sorted(head for head in heads if head[1]) == sorted(expected)
            assert {run_id for run_id, *_ in heads} == {run_id for run_id, *_ in expected}
            sent.clear()
            call(clone, *send, *folders)  # what was sent is marked, and skipped
            assert not [one for one in sent if b"mutation" in one]


def test_no_file_of_a_climb_holds_a_key_that_was_around_it(first_run, clone):
    (git := clone / ".git/config").write_text(git.read_text().replace(SECRET, ""))  # where this was put by hand
    contents = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    contents |= {path: gzip.decompress(raw) for path, raw in contents.items() if path.suffix == ".gz"}
    notes = [path for path, content in contents.items() if NO_SECRET.encode() in content]
    assert sum(path.suffix == ".wandb" for path in notes) == wandb_runs(clone)  # so a key would be found there
    assert [path for path, content in contents.items() if SECRET.encode() in content] == []
    assert SECRET not in first_run


def test_the_trial_is_shared_with_the_facts_of_its_run_and_not_with_anothers(clone, tmp_path, encoding):
    assert f"hf upload OWNER/net {tmp_path}/net ." in call(clone, "make", "share", f"FOLDER={tmp_path}/net")
    card, found = (tmp_path / "net/README.md").read_text(), read_metrics(clone, "trial")
    environment = json.loads((clone / "results/environment.json").read_text())
    corpus, train = (clone / f"data/{name}" for name in ("input.txt", "train.bin"))
    commit = call(clone, "git", "rev-parse", "HEAD").strip()
    for fact in (
        *("**4 steps old**", "on 512 tokens", "shards: 1, the first with", "2 x 64 tokens; 128 tokens a step"),
        *(f"{found[name]:.4f}" for name in ("loss_first", "loss_last", "val_loss", "bits_per_byte")),
        *(f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in (corpus, train)),
        *(environment["torch"], environment["device_name"], f"git checkout {commit}", '| `precision` | "fp32" |'),
    ):
        assert fact in card
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "net")(torch.tensor([encoding.encode("Before we")])).logits
    ours, _ = hub_format.load_gpt(clone / "models/trial")(torch.tensor([encoding.encode("Before we")]))
    torch.testing.assert_close(logits, ours, rtol=0, atol=2e-5 * ours.abs().max().item())
    refused = "env", "PYTHONPATH=src", "python", "-m", "pipeline.tools.share", "other"
    set_param(clone, "precision", "bf16")
    assert "params.yaml: precision" in call(clone, *refused, exit_code=1, stderr=True)
    get_back(clone)
    weights = clone / "models/trial/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # a link into DVC's cache is not written through
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "models/trial;" in call(clone, *refused, exit_code=1, stderr=True)
    weights.unlink()
    get_back(clone)
    assert not (clone / "other").exists()
    (clone / "src/note.txt").write_text("not committed")
    call(clone, *refused)
    assert "It cannot be repeated from a commit" in (clone / "other/README.md").read_text()
    shutil.rmtree(clone / "other")
    (clone / "src/note.txt").unlink()


def test_nothing_untracked_is_left_behind(clone):
    assert call(clone, "git", "status", "--porcelain") == ""


def test_a_second_run_runs_nothing_but_the_environment(clone):
    written = (clone / "dvc.lock").stat().st_mtime_ns
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}
    assert (clone / "dvc.lock").stat().st_mtime_ns == written  # it is long: to write it takes half as long as all else


def test_a_longer_benchmark_stays_until_something_changes(clone):
    call(clone, "make", "benchmark", "ROUNDS=7")
    assert json.loads((clone / "results/gains.json").read_text())["rounds"] == 7
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}
    get_back(clone)


def test_plots_are_a_page_that_loads_nothing(clone):
    call(clone, "make", "plots")
    page = (clone / "dvc_plots/index.html").read_text()
    assert 'src="http' not in page
    assert "vegaEmbed" in page
    assert '"level": "padded"' in page
    assert call(clone, "git", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("dvc metrics show", "results/levels/padded/metrics.json"),
        ("dvc metrics diff", ""),
        ("dvc params diff", ""),
        ("dvc exp show --only-changed", "main|master"),
        ("make plan", "allocator"),
        ("make plan MEMORY=24GiB", "this plans the CPU's shape for a GPU"),
        ("make docs", ""),
        ("make schema", ""),
        ('make sample PROMPT="Once upon a time"', "(?m)^Once upon a time"),
        ("python -m pipeline.tools.compare padded bf16", "padded over bf16: .* times as fast"),
        ("python -m pipeline.tools.compare experiments/runs/xeon-amx.json", "here: .*\nthere: .*"),
    ],
)
def test_what_a_reader_looks_at_is_there(clone, command, shown):
    assert re.search(shown, call(clone, "env", "PYTHONPATH=src", *shlex.split(command)))
    assert call(clone, "git", "status", "--porcelain") == ""  # the pages and the schema were current


def test_one_level_is_trained_again_and_the_table_follows(clone):
    assert stages_that_ran(call(clone, "dvc", "repro", "-f", "-s", "train@bf16")) == {"train@bf16"}
    # its losses are the same
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment", "parity", "report"}
    get_back(clone)


def test_asking_the_hub_again_where_there_is_none_trains_nothing(clone):
    digest = hashlib.md5((clone / "data/input.txt").read_bytes()).hexdigest()
    cached = clone / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    right = cached.read_bytes()
    cached.chmod(0o644)
    cached.write_bytes(right + b"EVIL LINE\n")
    cached.chmod(0o444)  # what DVC takes for whole
    output = call(clone, "env", "HF_ENDPOINT=http://127.0.0.1:9", "dvc", "repro", "-f", "download")
    assert stages_that_ran(output) == {"download"}
    assert (clone / "data/input.txt").read_bytes() == cached.read_bytes() == right
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment", "verify"}  # the stand-in has another reason
    get_back(clone)


def test_a_machines_own_numbers_are_committed_and_the_last_commit_is_a_way_back(clone):
    call(clone, "dvc", "commit", "trial")  # as after a training that torchrun started by hand
    set_param(clone, "levels.init.init", "pytorch")
    call(clone, "dvc", "repro")
    assert "levels.init.init" in call(clone, "dvc", "params", "diff")
    assert "results/levels/init/metrics.json" in call(clone, "dvc", "metrics", "diff")
    call(clone, "git", "add", "params.yaml", "dvc.lock", "results", "docs/levels")
    call(clone, "git", "commit", "-m", "My machine")
    assert call(clone, "git", "status", "--porcelain") == ""
    call(clone, "git", "reset", "--quiet", "--soft", "HEAD~1")
    call(clone, "git", "reset", "--quiet")
    get_back(clone)


def test_ones_own_keys_stay_out_of_git(clone):
    call(clone, "dvc", "remote", "add", "--default", "store", "s3://bucket/path")
    call(clone, "dvc", "remote", "modify", "--local", "store", "profile", "NAME")
    assert "NAME" not in (clone / ".dvc/config").read_text()
    assert call(clone, "git", "status", "--porcelain").split() == ["M", ".dvc/config"]
    (clone / ".dvc/config.local").unlink()
    call(clone, "git", "restore", ".dvc/config")


def test_experiments_are_removed_and_their_networks_with_them(clone):
    def cached() -> int:
        return len(list((clone / ".dvc/cache/files").rglob("*")))

    before = cached()
    call(clone, "dvc", "exp", "run", "-S", "precision=bf16")
    assert re.search(r"\| precision .*\| bf16 ", call(clone, "make", "show"), re.DOTALL)
    get_back(clone)
    assert cached() > before
    call(clone, "dvc", "exp", "remove", "--all-commits")
    call(clone, "sh", "-c", "yes | dvc gc --workspace --all-branches")
    assert cached() <= before
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}


def test_a_level_that_computes_something_else_stops_before_the_benchmark(clone):
    set_param(clone, "levels.bf16.init", "pytorch")
    output = call(clone, "dvc", "repro", exit_code=255)
    assert stages_that_ran(output) == {"environment", "probe", "train@bf16", "parity"}
    get_back(clone)


def test_a_new_level_is_one_row(clone):
    last = params_yaml.load(clone / "params.yaml").levels[LEVELS[-1]]
    set_param(clone, "levels.mine", last.model_dump() | {"compile": not last.compile})
    ran = stages_that_ran(call(clone, "dvc", "repro"))
    assert ran == {"environment", "probe", "train@mine", "parity", "benchmark", "report"}
    assert "| mine " in (clone / "results/report/ladder.md").read_text()
    shutil.rmtree(clone / "results/levels/mine")  # untracked, so git restore leaves it
    get_back(clone)


def test_an_edited_row_runs_that_level_alone(clone):
    set_param(clone, "levels.init.init", "pytorch")
    ran = stages_that_ran(call(clone, "dvc", "repro"))
    assert ran == {"environment", "probe", "train@init", "parity", "report"}  # no quality row concerns the benchmark
    get_back(clone)
