"""The stages that train: overfit and train."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2_ladder import params_yaml
from gpt2_ladder.config import Recipe, UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.params import Params
from gpt2_ladder.running.following import follow
from gpt2_ladder.training import capabilities, data, loop, metrics
from gpt2_ladder.training.metrics import Step
from helpers.common import REPOSITORY
from helpers.memory import Capped
from helpers.trainings import train
from pipeline import ENVIRONMENT, TRAIN_SHARD, environment, overfit, probe, trial
from pipeline import train as train_stage


def test_a_level_that_cannot_run_here_writes_the_reason_and_does_not_train(params):
    machine = environment.describe().model_copy(update={"compile_problem": "no C++ compiler"})
    write_json(ENVIRONMENT, machine.model_dump())
    assert train(params, "flash", Path("flash")) is False
    result = json.loads(Path("flash/metrics.json").read_text())
    assert (result["status"], result["reason"]) == ("skipped", "torch.compile cannot work here: no C++ compiler")
    assert {result[name] for name in metrics.MEASURED} == {None}
    rows = Path("flash/steps.csv").read_text()
    assert rows == "step,loss,step_ms,tokens_per_second,grad_norm,micro_batch,seconds\n"


@pytest.mark.parametrize(("tokens_per_step", "epochs"), [(None, 10), (128, 20)])
def test_epochs_seen_counts_the_passes_of_the_loader(params, monkeypatch, tokens_per_step, epochs):
    data.write_shard(TRAIN_SHARD, list(range(125)))  # one batch of 4 x 16 tokens; the rest of an epoch is not used
    document = params.model_dump() | {"checkpoint_every": None}
    document["machines"]["cpu"] |= {"batch_size": 4, "block_size": 16, "steps": 10, "eval_tokens": 64}
    document["recipe"]["tokens_per_step"] = tokens_per_step
    changed = Params.model_validate(document)
    loaders, make = [], data.Batches
    monkeypatch.setattr(data, "Batches", lambda *arguments: loaders.append(make(*arguments)) or loaders[-1])
    assert train(changed)
    assert json.loads(Path("results/metrics.json").read_text())["epochs_seen"] == epochs
    assert loaders[0].position == {"epoch": epochs, "batch": 0}


def test_a_level_whose_change_has_no_effect_here_is_not_trained(params, monkeypatch):
    monkeypatch.setattr(params_yaml, "load", lambda: params)
    probe.main()
    train_stage.main("tf32")
    result = json.loads(Path("results/levels/tf32/metrics.json").read_text())
    reason = "`precision: tf32` has no effect on this device: TF32 is a mode of NVIDIA GPUs"
    assert (result["status"], result["reason"], result["loss_last"]) == ("skipped", reason, None)
    train_stage.main("fp32")
    assert json.loads(Path("results/levels/fp32/metrics.json").read_text())["status"] == "trained"


@pytest.mark.slow
def test_many_cores_compile_each_distinct_network_ahead(params, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(probe, "MANY_CORES", 1)
    monkeypatch.setattr(capabilities, "why_skipped", lambda *_: None)  # bf16 on a machine without it, too
    compiled = {name: params.levels[name] for name in ("fp32", "padded", "fused", "allocator")}  # three with one graph
    Path("params.yaml").write_text(params.model_copy(update={"levels": compiled}).model_dump_json())
    probe.main()
    assert "compiling 1 networks, 1 at a time\nprobe: padded is compiled\n" in capsys.readouterr().out
    torch._dynamo.utils.counters.clear()  # of compilations in other tests
    train(params, "fused", Path("fused"))
    assert json.loads(Path("fused/metrics.json").read_text())["compile_cache"] == "warm"


def test_a_training_leaves_out_a_switch_without_effect_and_notes_it(params):
    results = {}
    for name, precision in (("plain", "fp32"), ("own", "tf32")):
        train(params.model_copy(update={"precision": precision}), folder=Path(name))
        results[name] = json.loads(Path(name, "metrics.json").read_text())
    assert results["own"]["note"].startswith("`precision: tf32` has no effect on this device")
    assert results["plain"]["note"] is None
    for key in ("float32_matmul_precision", "loss_last"):
        assert results["own"][key] == results["plain"][key]


def test_a_training_that_runs_out_of_memory_continues_with_half_the_rows(params):
    with Capped(float("inf")) as memory:
        train(params, "fp32", Path("whole"))
    with Capped(memory.peak - 2**20):
        train(params, "fp32", Path("halved"))
    whole, halved = (json.loads(Path(name, "metrics.json").read_text()) for name in ("whole", "halved"))
    assert (whole["micro_batch"], halved["micro_batch"]) == (2, 1)
    assert halved["loss_last"] == pytest.approx(whole["loss_last"], abs=1e-4)
    assert halved["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)


def test_a_training_with_cuda_graphs_is_not_continued_with_half_the_rows(params, monkeypatch):
    monkeypatch.setattr(capabilities, "without_effect", lambda *_: {})  # as on a GPU
    params.levels["fp32"] = params.levels["fp32"].model_copy(update={"cuda_graphs": True})  # not compiled: a CPU's test
    with Capped(float("inf")) as memory:
        train(params, "fp32", Path("whole"))
    with (
        Capped(memory.peak - 2**20),
        pytest.raises(UserError, match=r"with 2 rows at a time .* set cuda_graphs: false"),
    ):
        train(params, "fp32", Path("stopped"))
    assert not Path("stopped/metrics.json").exists()


@pytest.mark.parametrize(
    ("tokens_per_step", "count", "micro_batch", "parts"),
    [(None, 1, 2, 1), (None, 1, 1, 2), (64, 1, 2, 2), (64, 2, 2, 1)],
)
def test_a_device_trains_its_rows_of_a_step_in_parts(params, tokens_per_step, count, micro_batch, parts):
    job = train_stage.make_job(params, "fp32")  # 2 x 16 tokens
    job = replace(job, recipe=Recipe(tokens_per_step=tokens_per_step), devices=count)
    assert job.micro_batches(micro_batch) == parts


def test_a_training_with_an_attention_kernel_that_the_device_lacks_is_refused(params):
    with pytest.raises(UserError, match=r"attention: efficient, but torch has no efficient kernel .* on a CPU: set"):
        train(params.model_copy(update={"attention": "efficient"}))
    assert not Path("results/metrics.json").exists()


def test_a_training_that_cannot_continue_leaves_no_result(params):
    # the weights, 1.6 MB, fit, twice while they are drawn; the logits of a row, 3.2 MB, and their logarithms do not
    with Capped(6e6), pytest.raises(UserError, match="out of memory with one row at a time"):
        train(params, "fp32", Path("failed"))
    assert [path.name for path in Path("failed").iterdir()] == ["steps.csv"]
    assert len(Path("failed/steps.csv").read_text().splitlines()) == 1  # the titles


@pytest.mark.parametrize("names", [["fp16"], [], ["fp32", "bf16"]])
def test_an_unknown_level_is_refused(monkeypatch, names):
    monkeypatch.chdir(REPOSITORY)
    message = f"level '{' '.join(names)}' is not in params.yaml: run python -m pipeline.train LEVEL with one of untied,"
    with pytest.raises(UserError, match=message):
        train_stage.main(*names)


def test_a_loss_that_is_no_number_stops_the_training():
    logged = []
    recorder = SimpleNamespace(log=logged.append)
    steps = (Step(index, loss, 1.0, 1.0, 1.0, 4, 1.0) for index, loss in enumerate([3.0, math.nan, 2.0]))
    job = train_stage.make_job(params_yaml.load(REPOSITORY / "params.yaml"), "bf16")
    with pytest.raises(UserError, match=r"bf16: at step 1 the loss is nan and the gradient's norm 1\.0; lower models"):
        follow(steps, recorder, job)
    assert len(logged) == 2


@pytest.mark.parametrize(
    ("stage", "names"), [(overfit, []), (train_stage, ["fp32"]), (trial, [])], ids=["overfit", "train", "trial"]
)
def test_a_stage_that_is_run_again_trains_again(params, monkeypatch, stage, names):
    monkeypatch.setattr(overfit, "check", lambda *_: None)
    document = params.model_dump() | {"checkpoint_every": None}
    document["trial"]["cpu"]["seconds"] = 0
    Path("params.yaml").write_text(json.dumps(document))
    taken, step, clocks = [], loop.train_step, []
    monkeypatch.setattr(loop, "train_step", lambda *args: taken.append(1) or step(*args))
    for _ in range(2):
        taken.clear()
        stage.main(*names)
        (path,) = Path("results").rglob("steps.csv")
        rows = path.read_text().splitlines()[1:]
        assert len(rows) == len(taken) > 10
        clocks.append([row.split(",")[-1] for row in rows])
    assert clocks[0] != clocks[1]


def test_the_overfit_stage_scales_its_loss_if_its_level_is_in_float16(params, monkeypatch):
    untied, seen = params.levels["untied"].model_copy(update={"precision": "fp16"}), []
    monkeypatch.setattr(params_yaml, "load", lambda: params.model_copy(update={"levels": {"untied": untied}}))
    monkeypatch.setattr(loop, "train_step", lambda *step: seen.append(step[-1].is_enabled()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        overfit.main()
    assert seen == [True]


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (10.0, 0.001, "not within 0.3"),
        (math.nan, 0.001, "not within 0.3"),
        (10.98, 0.006, "over the bound 0.005"),
        (10.98, math.nan, "over the bound 0.005"),
    ],
)
def test_the_overfit_stage_fails_where_a_loss_is_out_of_bounds(first, last, message):
    overfit.check(10.98, 0.003, 50257, 0.005)
    with pytest.raises(UserError, match=message):
        overfit.check(first, last, 50257, 0.005)
