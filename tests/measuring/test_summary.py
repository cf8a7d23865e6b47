"""The summary in gains.json: gains, rates, and shares of the machine's peak."""

import pytest

from gpt2_ladder.measuring import summary
from gpt2_ladder.measuring.gains import Measurement
from helpers.common import environment, measurement, params_with


def test_the_peak_is_given_or_looked_up_for_a_gpu_or_measured_on_a_cpu_or_unknown():
    params, on_cpu = params_with(), measurement(fp32=[300.0] * 3)
    assert summary.find_peaks(params, "tf32", on_cpu) == [0.2] * 3
    assert summary.find_peaks(params, "bf16", on_cpu) == [0.4] * 3
    a100 = on_cpu.model_copy(update={"environment": environment(device="cuda", device_name="NVIDIA A100-SXM4-80GB")})
    unknown = on_cpu.model_copy(update={"environment": environment(device="cuda", device_name="NVIDIA X")})
    assert summary.find_peaks(params, "bf16", a100) == [312.0] * 3
    assert summary.find_peaks(params, "bf16", unknown) is None
    given = params_with(peak_tflops={"bf16": 77.0})
    assert summary.find_peaks(given, "bf16", unknown) == [77.0] * 3
    assert summary.find_peaks(given, "bf16", on_cpu) == [77.0] * 3


def on_gpu(name: str, **products: float) -> Measurement:
    """Return a benchmark on the GPU `name` in which fp32 took 3,940 ms and a product reached `products` TFLOP/s."""
    run = measurement(fp32=[3940.0] * 3, tf32=[3940.0] * 3)
    rounds = [each.model_copy(update={"matmul_tflops": products}) for each in run.rounds]
    machine = environment(device="cuda", device_name=name)
    return run.model_copy(update={"environment": machine, "rounds": rounds})


def shares(run: Measurement) -> list[tuple[float | None, float | None]]:
    """Return the share of the peak and of the device's own product of every level, rounded."""
    params = params_with()
    content = summary.summarize(params, {name: params.levels[name] for name in run.levels}, run)
    levels = content["levels"].values()
    return [tuple(row[key] and round(row[key], 3) for key in ("mfu", "mfu_of_product")) for row in levels]


def test_a_gpu_has_a_share_of_its_data_sheet_and_of_its_own_product():
    """A level reaches 0.1 TFLOP/s; the A100's peaks are 19.5 in fp32 and 156 in tf32."""
    assert shares(on_gpu("NVIDIA A100-SXM4-80GB", fp32=0.2, tf32=0.4)) == [(0.005, 0.5), (0.001, 0.25)]
    assert shares(on_gpu("NVIDIA X", fp32=0.2, tf32=0.4)) == [(None, 0.5), (None, 0.25)]
    without_products = on_gpu("NVIDIA A100-SXM4-80GB")  # as measured until November 2026
    assert shares(without_products) == [(0.005, None), (0.001, None)]


def test_the_peak_of_a_cpu_is_its_own_product():
    run = measurement(fp32=[3940.0] * 3, tf32=[3940.0] * 3)
    assert shares(run) == [(0.5, 0.5), (0.5, 0.5)]  # the product reached 0.2, for TF32 too


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
