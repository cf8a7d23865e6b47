"""The parity stage: which trainings it compares, and which it refuses to compare."""

import json
from pathlib import Path

import pytest

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from helpers.common import environment, params_with
from pipeline import ENVIRONMENT, benchmark, parity


def metrics_of(level: str) -> Path:
    return Path(f"results/levels/{level}/metrics.json")


@pytest.fixture
def two_trained(tmp_path, monkeypatch):
    """A folder in which 8 devices have trained fp32, with two rows at a time, and bf16, with one."""
    monkeypatch.chdir(tmp_path)
    params, machine = params_with(), environment(device="cuda")
    params.levels["bf16"] = params.levels["bf16"].model_copy(update={"allocator": "caching"})
    monkeypatch.setattr(params_yaml, "load", lambda: params)
    write_json(ENVIRONMENT, machine.model_dump())
    same = {"environment": machine.fingerprint, "devices": 8, "float32_matmul_precision": "ieee"}
    for name, level in params.levels.items():
        if level.group == "speed":
            micro_batch = {"fp32": 2, "bf16": 1}.get(name)
            status = "trained" if micro_batch else "skipped"
            write_json(metrics_of(name), {**same, "status": status, "micro_batch": micro_batch})
            metrics_of(name).with_name("steps.csv").write_text("step,loss,grad_norm\n0,10.9,1.0\n1,9.9,1.0\n")


def test_all_levels_are_measured_with_the_smallest_micro_batch(two_trained):
    parity.main()
    assert json.loads(Path("results/parity.json").read_text())["micro_batch"] == 1


def test_the_benchmark_gets_the_switches_that_have_an_effect_here(two_trained):
    parity.main()
    switches = benchmark.read_levels()[0]["bf16"]
    assert (switches.precision, switches.allocator) == ("bf16", "system")


@pytest.mark.parametrize(("norms", "checked"), [("1.0 1.0", 2), ("1.0 inf", 2), ("nan 1.0", 1)])
def test_losses_after_a_step_that_float16_skipped_are_not_compared(two_trained, norms, checked):
    """Its batch did not change the weights, as it did at the baseline."""
    losses, second = ["10.9", "9.9"], ["10.9", "9.9" if checked == 2 else "9.7"]
    for name, curve, column in (("fp32", losses, "1.0 1.0"), ("bf16", second, norms)):
        rows = [f"{step},{loss},{norm}" for step, loss, norm in zip((0, 1), curve, column.split(), strict=True)]
        metrics_of(name).with_name("steps.csv").write_text("\n".join(["step,loss,grad_norm", *rows]))
    parity.main()
    assert json.loads(Path("results/parity.json").read_text())["levels"]["bf16"]["steps"] == checked


@pytest.mark.parametrize(("micro_batch", "measured"), [(2, ["fp32", "bf16", "cuda_graphs"]), (1, ["fp32", "bf16"])])
def test_cuda_graphs_are_not_measured_if_the_benchmark_splits_its_batches(two_trained, micro_batch, measured):
    for name in ("fp32", "bf16", "cuda_graphs"):
        row = {**json.loads(metrics_of(name).read_text()), "status": "trained", "micro_batch": micro_batch}
        write_json(metrics_of(name), row)
    parity.main()
    levels = json.loads(Path("results/parity.json").read_text())["levels"]
    assert list(levels) == measured


def test_a_level_that_rounds_as_the_level_before_must_agree_with_it_more_closely(two_trained):
    """Here `fused` follows `bf16`, and is nearer to fp32 than a right bf16 may be."""
    curves = {"bf16": "10.901 9.901", "fused": "10.901 9.8990"}
    for name, curve in curves.items():
        write_json(metrics_of(name), {**json.loads(metrics_of("bf16").read_text()), "status": "trained"})
        rows = [f"{step},{loss},1.0" for step, loss in enumerate(curve.split())]
        metrics_of(name).with_name("steps.csv").write_text("\n".join(["step,loss,grad_norm", *rows]))
    parity.main()  # another precision, compiled, another vocabulary: compared with fp32 only
    settings = params_yaml.load()
    settings.levels["bf16"] = settings.levels["fused"].model_copy(update={"fused_adamw": False})
    with pytest.raises(UserError, match=r"level 'fused' has a loss of 9\.89900, level 'bf16' has 9\.90100"):
        parity.main()


def test_losses_of_different_numbers_of_devices_or_machines_are_not_compared(two_trained):
    other = environment(device="cuda", threads=4).fingerprint
    for change, message in (
        ({"devices": 1}, "trained on different numbers of devices: fp32 on 8, bf16 on 1; run `dvc repro`"),
        ({"environment": other}, f"the results of bf16 are from environment {other}"),
    ):
        write_json(metrics_of("bf16"), json.loads(metrics_of("fp32").read_text()) | change)
        with pytest.raises(UserError, match=message):
            parity.main()


def test_a_level_trained_with_the_wrong_matmul_precision_is_refused():
    """Its losses would agree, so only the recorded setting shows it."""
    level = params_with().levels["bf16"]
    parity.check_matmul_precision("bf16", level, "ieee")
    with pytest.raises(UserError, match="level 'bf16' was trained with tf32 matrix products, but precision bf16 means"):
        parity.check_matmul_precision("bf16", level, "tf32")
