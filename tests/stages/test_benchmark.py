"""The benchmark stage: its arms, the machine's peak, and the summary in gains.json."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from gpt2_ladder import config
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from helpers.common import REPOSITORY, environment, measurement, params_with
from pipeline import PROFILE, TRACES, benchmark


def test_the_baseline_has_a_second_arm_as_its_control():
    params = params_with(model="tiny")
    levels = {name: params.levels[name] for name in ("fp32", "bf16", "padded")}
    arms = benchmark.build_arms(params, {**levels, "control": levels["fp32"]}, torch.device("cpu"), 2)
    assert [arm.name for arm in arms] == ["fp32", "bf16", "padded", "control"]
    assert arms[0].model is not arms[3].model
    assert arms[0].optimizer is arms[1].optimizer is arms[3].optimizer is not arms[2].optimizer


def test_the_allocator_level_is_measured_in_its_own_process_only_on_a_cpu():
    params, device = params_with(model="tiny"), torch.device("cpu")
    levels = {name: params.levels[name] for name in ("chunked", "allocator")}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # never started: it gets no work
        for kind, arm_types in (("cpu", [Arm, RemoteArm]), ("cuda", [Arm, Arm])):
            arms = benchmark.place_arms(params, levels, environment(device=kind), device, 2, process)
            assert [arm.name for arm in arms] == ["chunked", "allocator"]
            assert [type(arm) for arm in arms] == arm_types


def test_the_peak_is_given_or_looked_up_for_a_gpu_or_measured_on_a_cpu_or_unknown():
    params, on_cpu = params_with(), measurement(fp32=[300.0] * 3)
    assert benchmark.find_peaks(params, "tf32", on_cpu) == [0.2] * 3
    assert benchmark.find_peaks(params, "bf16", on_cpu) == [0.4] * 3
    a100 = on_cpu.model_copy(update={"environment": environment(device="cuda", device_name="NVIDIA A100-SXM4-80GB")})
    unknown = on_cpu.model_copy(update={"environment": environment(device="cuda", device_name="NVIDIA X")})
    assert benchmark.find_peaks(params, "bf16", a100) == [312.0] * 3
    assert benchmark.find_peaks(params, "bf16", unknown) is None
    given = params_with(peak_tflops=config.Peaks(fp32=None, tf32=None, bf16=77.0))
    assert benchmark.find_peaks(given, "bf16", unknown) == [77.0] * 3
    assert benchmark.find_peaks(given, "bf16", on_cpu) == [77.0] * 3


def test_the_summary_has_gains_rates_and_shares_of_the_peak():
    params = params_with()
    levels = {name: params.levels[name] for name in ("fp32", "bf16")}
    summary = benchmark.summarize(params, levels, measurement(fp32=[3940.0] * 3, bf16=[1970.0] * 3))
    assert summary["control"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    bf16 = summary["levels"]["bf16"]
    assert bf16["tokens_per_second"] == pytest.approx(512 / 1.97)
    assert bf16["tflops"] == pytest.approx(0.2, rel=1e-2)  # 770 MFLOP a token at T=256, 512 tokens
    assert bf16["mfu"] == pytest.approx(0.5, rel=1e-2)
    assert (bf16["over_previous"]["over"], bf16["over_previous"]["ratio"]) == ("fp32", 2.0)


def test_each_level_but_the_control_is_profiled_and_leaves_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = params_with(model="tiny")
    contestants = dict.fromkeys(("fp32", config.CONTROL), params.levels["fp32"])
    arms = benchmark.build_arms(params, contestants, torch.device("cpu"), 1)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    benchmark.profile(arms, (ids, ids), torch.device("cpu"))
    costs = json.loads(PROFILE.read_text())
    assert list(costs) == ["fp32"]
    assert "aten::mm" in {operator["name"] for operator in costs["fp32"]}
    assert [path.name for path in TRACES.iterdir()] == ["fp32.json.gz"]


def test_too_few_rounds_are_refused(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match="--rounds 5: at least 6"):
        benchmark.main("--rounds", "5")
