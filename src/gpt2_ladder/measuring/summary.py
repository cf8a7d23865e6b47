"""Summarize the benchmark's rounds as results/gains.json: gains, throughput, and the share of the hardware's peak."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from gpt2_ladder.config import Precision, Switches
from gpt2_ladder.measuring import cost
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.params import Params
from gpt2_ladder.training import devices, metrics

PEAK_SOURCES = {True: "what a bare matrix product reached in the same round", False: "the GPU's dense peak"}


def summarize(params: Params, levels: Mapping[str, Switches], measurement: Measurement) -> dict[str, Any]:
    """Return the content of gains.json. `levels` maps the name of every measured level to its switches."""
    tokens = measurement.batch_size * measurement.block_size
    flops = tokens * cost.flops_per_token(params.size, measurement.block_size)
    noise, names = measurement.noise(), measurement.levels
    summary: dict[str, Any] = {}
    for previous, name in zip([None, *names], names, strict=False):
        step_ms = measurement.step_ms(name)
        rates = [cost.tflops(flops, ms) for ms in step_ms]
        peaks = find_peaks(params, levels[name].precision, measurement)
        products = find_products(levels[name].precision, measurement)
        summary[name] = {
            "step_ms": median(step_ms),
            "tokens_per_second": metrics.tokens_per_second(tokens, median(step_ms)),
            "tflops": median(rates),
            "peak_tflops": median(peaks) if peaks else None,
            "mfu": share(rates, peaks),
            "product_tflops": median(products) if products else None,
            "mfu_of_product": share(rates, products),
            "over_previous": measurement.compare(name, previous, noise) if previous else None,
            "over_baseline": measurement.compare(name, names[0], noise) if previous else None,
        }
    return {
        "environment": measurement.environment.fingerprint,
        "estimator": measurement.estimator,
        "rounds": len(measurement.rounds),
        "processes": measurement.processes,
        "peak_source": PEAK_SOURCES[devices.peak_is_measured(measurement.environment.device)],
        "product_size": devices.PRODUCT_SIZES[measurement.environment.device],
        "control": asdict(noise),
        "levels": summary,
    }


def find_peaks(params: Params, precision: Precision, measurement: Measurement) -> list[float] | None:
    """Return the machine's peak TFLOP/s at `precision`, one value per round; None if the peak is unknown.

    If peak_tflops is set in params.yaml, return it. Otherwise, NVIDIA GPUs are looked up in KNOWN_PEAKS. On other
    devices the peak is the rate of a bare matrix product in the same round.
    """
    given, environment = params.peak_tflops.get(precision), measurement.environment
    if given is None and devices.peak_is_measured(environment.device):
        return find_products(precision, measurement)
    known = given or cost.KNOWN_PEAKS.get(environment.device_name, {}).get(precision)
    return [known] * len(measurement.rounds) if known else None


def find_products(precision: str, measurement: Measurement) -> list[float] | None:
    """Return the TFLOP/s of a bare matrix product at `precision`, one value per round; None if it was not measured."""
    key = devices.product_precision(precision, measurement.environment.device)
    rates = [round_.matmul_tflops[key] for round_ in measurement.rounds if key in round_.matmul_tflops]
    return rates if len(rates) == len(measurement.rounds) else None


def share(rates: Sequence[float], peaks: Sequence[float] | None) -> float | None:
    """Return the median share of `rates` in `peaks`, which have one value per round; None if there are no peaks."""
    return median(rate / peak for rate, peak in zip(rates, peaks, strict=True)) if peaks else None
