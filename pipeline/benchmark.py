"""Measure what each speed level gains, by steps taken in turn, and where their time goes.

`--rounds 30` measures for longer than params.yaml asks.
"""

import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gpt2_ladder import params_yaml
from gpt2_ladder.config import CONTROL, MINIMUM_ROUNDS, Environment, Params, Switches, UserError
from gpt2_ladder.measuring import cost, profiling, turns
from gpt2_ladder.measuring.gains import ESTIMATOR, Measurement
from gpt2_ladder.measuring.profiling import Operator
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from gpt2_ladder.training import data, devices, loop, metrics, runtime
from pipeline import (
    BENCHMARK,
    GAINS,
    PARITY,
    PROFILE,
    TRACES,
    TRAIN_SHARD,
    Parser,
    read_environment,
    read_json,
    run,
    write_json,
)

PEAK_SOURCES = {True: "what a bare matrix product reached in the same round", False: "the GPU's dense peak"}


def main(*arguments: str) -> None:
    params, environment = params_yaml.load(), read_environment()
    devices.check_machine(params.machine, params.rehearsal, environment)
    settings, shape = params.benchmark[params.machine], params.shape("speed")
    parser = Parser(prog="python -m pipeline.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, help="so many rounds, however long they last")
    longer = parser.parse_args(arguments).rounds
    if longer is not None and longer < MINIMUM_ROUNDS:
        raise UserError(f"--rounds {longer}: at least {MINIMUM_ROUNDS} are needed for an interval")
    rounds, seconds = (longer, float("inf")) if longer else (settings.rounds, settings.seconds)
    contestants, micro_batch = read_contestants()
    levels = {name: switches for name, switches in contestants.items() if name != CONTROL}
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    shard = data.open_shard(TRAIN_SHARD)
    batches = list(islice(data.Batches(shard, shape.batch_size, shape.block_size), shape.steps))
    measured = []
    kinds = sorted({matmul_kind(switches.precision) for switches in levels.values()})
    matmuls = kinds if devices.peak_is_measured(environment.device) else []
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # started for the first level that needs it
        arms = place_arms(params, contestants, environment, device, micro_batch, process)
        for name in turns.warm_up(arms, batches[0], device, params.seed):
            print(f"benchmark: warming up {name}", flush=True)
        for one in turns.measure(arms, batches, device, rounds, seconds, params.seed, matmuls):
            measured.append(one)
            times = "  ".join(f"{name} {step_ms:,.0f}" for name, step_ms in one.step_ms.items())
            print(f"benchmark: round {len(measured)}/{rounds}, ms a step: {times}", flush=True)
        profile(arms if params.profile else [], batches[0], device)
    measurement = Measurement(
        estimator=ESTIMATOR,
        model=params.model,
        batch_size=shape.batch_size,
        block_size=shape.block_size,
        levels=list(levels),
        control=CONTROL,
        environment=environment,
        rounds=measured,
    )
    write_json(BENCHMARK, measurement.model_dump())
    write_json(GAINS, summarize(params, levels, measurement))


def read_contestants() -> tuple[dict[str, Switches], int]:
    """Return the switches of every level that passed parity, and of the control, by name; and their micro-batch."""
    parity = read_json(PARITY)
    levels = {
        name: Switches.model_validate({key: found["switches"][key] for key in Switches.model_fields})
        for name, found in parity["levels"].items()
    }
    return {**levels, CONTROL: levels[parity["baseline"]]}, parity["micro_batch"]


def place_arms(
    params: Params,
    contestants: dict[str, Switches],
    environment: Environment,
    device: torch.device,
    micro_batch: int,
    process: ProcessPoolExecutor,
) -> list[Arm | RemoteArm]:
    """Return an arm for each of `contestants`: here, or in `process` where it would change the others' memory."""
    alone = {name for name, switches in contestants.items() if devices.needs_own_process(switches, environment)}
    here = {name: switches for name, switches in contestants.items() if name not in alone}
    built = {arm.name: arm for arm in build_arms(params, here, device, micro_batch)}
    return [RemoteArm(name, process, open_arm) if name in alone else built[name] for name in contestants]


@cache
def open_arm(name: str) -> Arm:
    """Return the arm of level `name`, whose switches set the whole of this process; one process, one set of them."""
    params, environment = params_yaml.load(), read_environment()
    contestants, micro_batch = read_contestants()
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    devices.keep_freed_memory(device)
    return build_arms(params, {name: contestants[name]}, device, micro_batch)[0]


def build_arms(params: Params, contestants: dict[str, Switches], device: torch.device, micro_batch: int) -> list[Arm]:
    """Return an arm for each of `contestants`, on shared weights, all with one micro-batch."""
    weights = turns.Weights(params.seed, params.size.learning_rate, params.optimizer, device)
    arms = []
    for name, switches in contestants.items():
        model, optimizer = weights.lend(params.gpt(switches), switches.fused_adamw)
        if switches.compile:
            runtime.compile_model(model)
        arms.append(Arm(name, model, optimizer, switches.precision, micro_batch))
    return arms


def profile(arms: list[Arm | RemoteArm], batch: loop.Batch, device: torch.device) -> None:
    """Take one more step of every arm under the profiler; write the costs of its operators, and a trace of it."""
    shutil.rmtree(TRACES, ignore_errors=True)
    TRACES.mkdir()
    costs = {
        arm.name: arm.run(profile_arm, batch, device, TRACES / f"{arm.name}.json.gz")
        for arm in arms
        if arm.name != CONTROL
    }
    write_json(PROFILE, {name: [asdict(operator) for operator in found] for name, found in costs.items()})


def profile_arm(arm: Arm, batch: loop.Batch, device: torch.device, trace: Path) -> list[Operator]:
    """Return what the operators of a step of `arm` cost, the costliest first."""
    return profiling.profile_step(partial(arm.step, batch, device), devices.profiler_activities(device), trace)


def summarize(params: Params, levels: dict[str, Switches], measurement: Measurement) -> dict[str, Any]:
    """Return what gains.json holds: per level its gains, its rate, and its share of what the machine could do."""
    tokens = measurement.batch_size * measurement.block_size
    flops = tokens * cost.flops_per_token(params.size, measurement.block_size)
    noise, baseline = measurement.noise(), measurement.levels[0]
    summary: dict[str, Any] = {}
    for previous, name in zip([None, *levels], levels, strict=False):
        step_ms = measurement.step_ms(name)
        rates = [cost.tflops(flops, one) for one in step_ms]
        peaks = find_peaks(params, levels[name].precision, measurement)
        summary[name] = {
            "step_ms": statistics.median(step_ms),
            "tokens_per_second": metrics.tokens_per_second(tokens, statistics.median(step_ms)),
            "tflops": statistics.median(rates),
            "peak_tflops": statistics.median(peaks) if peaks else None,
            "mfu": statistics.median(rate / peak for rate, peak in zip(rates, peaks, strict=True)) if peaks else None,
            "over_previous": measurement.compare(name, previous, noise) if previous else None,
            "over_baseline": measurement.compare(name, baseline, noise) if previous else None,
        }
    return {
        "environment": measurement.environment.fingerprint,
        "estimator": measurement.estimator,
        "rounds": len(measurement.rounds),
        "peak_source": PEAK_SOURCES[devices.peak_is_measured(measurement.environment.device)],
        "control": asdict(noise),
        "levels": summary,
    }


def matmul_kind(precision: str) -> str:
    """Return the type of operand whose bare product is the peak for `precision` where the peak is measured: no TF32."""
    return runtime.PRECISIONS[precision].operand


def find_peaks(params: Params, precision: str, measurement: Measurement) -> list[float] | None:
    """Return what the machine could do at `precision` in every round, in TFLOP/s; None where nobody knows.

    The user's word counts first. NVIDIA's GPUs are looked up; the peak of a CPU or an Apple GPU is what a bare matrix
    product reached in that round.
    """
    given, environment = getattr(params.peak_tflops, precision), measurement.environment
    if given is None and devices.peak_is_measured(environment.device):
        return [one.matmul_tflops[matmul_kind(precision)] for one in measurement.rounds]
    known = given or cost.KNOWN_PEAKS.get(environment.device_name, {}).get(precision)
    return [known] * len(measurement.rounds) if known else None


if __name__ == "__main__":
    run(main)
