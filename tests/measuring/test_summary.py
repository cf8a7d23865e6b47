"""The summary in gains.json: gains, rates, and shares of the machine's peak."""

import pytest

from gpt2_ladder import config
from gpt2_ladder.measuring import summary
from helpers.common import environment, measurement, params_with


def test_the_peak_is_given_or_looked_up_for_a_gpu_or_measured_on_a_cpu_or_unknown():
    params, on_cpu = params_with(), measurement(fp32=[300.0] * 3)
    assert summary.find_peaks(params, "tf32", on_cpu) == [0.2] * 3
    assert summary.find_peaks(params, "bf16", on_cpu) == [0.4] * 3
    a100 = on_cpu.model_copy(update={"environment": environment(device="cuda", device_name="NVIDIA A100-SXM4-80GB")})
    unknown = on_cpu.model_copy(update={"environment": environment(device="cuda", device_name="NVIDIA X")})
    assert summary.find_peaks(params, "bf16", a100) == [312.0] * 3
    assert summary.find_peaks(params, "bf16", unknown) is None
    given = params_with(peak_tflops=config.Peaks(fp32=None, tf32=None, bf16=77.0))
    assert summary.find_peaks(given, "bf16", unknown) == [77.0] * 3
    assert summary.find_peaks(given, "bf16", on_cpu) == [77.0] * 3


def test_the_summary_has_gains_rates_and_shares_of_the_peak():
    params = params_with()
    levels = {name: params.levels[name] for name in ("fp32", "bf16")}
    content = summary.summarize(params, levels, measurement(fp32=[3940.0] * 3, bf16=[1970.0] * 3))
    assert content["control"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    bf16 = content["levels"]["bf16"]
    assert bf16["tokens_per_second"] == pytest.approx(512 / 1.97)
    assert bf16["tflops"] == pytest.approx(0.2, rel=1e-2)  # 770 MFLOP a token at T=256, 512 tokens
    assert bf16["mfu"] == pytest.approx(0.5, rel=1e-2)
    assert (bf16["over_previous"]["over"], bf16["over_previous"]["ratio"]) == ("fp32", 2.0)
