"""Measure the gain of every speed level in rounds with one step of each level, and profile one step of each."""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import pipeline
from gpt2_ladder import files, ledger
from gpt2_ladder.config import BASELINE, CONTROL, MINIMUM_ROUNDS, Switches, UserError
from gpt2_ladder.measuring import profiling, step_check, summary, turns
from gpt2_ladder.measuring.cost import Operator
from gpt2_ladder.measuring.gains import BETWEEN, ESTIMATOR, Measurement, Round
from gpt2_ladder.measuring.step_check import StepCheck
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from gpt2_ladder.params import Params
from gpt2_ladder.training import capabilities, data, devices, loop
from pipeline import Parser, read_metrics, read_settings, run

START_SECONDS = 30  # of a process: imports, weights, and uncompiled first steps


def main(*arguments: str) -> None:
    params, environment = read_settings()
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    limits, shape = params.benchmark[params.machine], params.shape("speed")
    parser = Parser(prog="python -m pipeline.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, metavar="N", help="measure N rounds, without a time limit")
    parser.add_argument("--processes", type=int, metavar="N", help="measure in N fresh processes, one after the other")
    options = parser.parse_args(arguments)
    rounds, seconds, processes = options.rounds, float("inf"), options.processes
    if processes is not None and processes < 2:
        raise UserError(f"--processes {processes}: the variance between processes needs at least 2; 5 are usual")
    if rounds is None:
        rounds, seconds = limits.rounds, limits.seconds
    elif rounds < MINIMUM_ROUNDS:
        raise UserError(f"--rounds {rounds}: too few for an interval; use at least {MINIMUM_ROUNDS}")
    levels, _ = read_levels()
    if processes:
        print(f"benchmark: {processes} processes take about {estimate_minutes(levels, rounds, processes):.0f} minutes")
        parts = [in_fresh_process(index, processes, rounds, seconds) for index in range(processes)]
    else:
        parts = [measure(0, 1, rounds, seconds)]
    measurement = Measurement(
        estimator=BETWEEN if processes else ESTIMATOR,
        model=params.model,
        batch_size=shape.batch_size,
        block_size=shape.block_size,
        levels=[name for name in levels if name != CONTROL],
        control=CONTROL,
        environment=environment,
        rounds=[round_ for rounds_of_one, _ in parts for round_ in rounds_of_one],
    )
    gains = summary.summarize(params, levels, measurement)
    for name, row in gains["levels"].items():
        row["step_check"] = asdict(parts[0][1][name])
    files.write_json(pipeline.BENCHMARK, measurement.model_dump())
    files.write_json(pipeline.GAINS, gains)


@ledger.phase("steps")
def in_fresh_process(*arguments: Any) -> tuple[list[Round], dict[str, StepCheck]]:
    """Return `measure(*arguments)`, called in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(measure, *arguments).result()


def measure(index: int, processes: int, rounds: int, seconds: float) -> tuple[list[Round], dict[str, StepCheck]]:
    """Measure the levels in this process, number `index` of `processes`; each has a seed of its own.

    The first process also checks the steps of every level (it returns their errors), and the last one profiles them.
    Raise UserError if a step is wrong.
    """
    params, environment = read_settings()
    shape, seed = params.shape("speed"), params.seed + index
    levels, micro_batch = read_levels()
    device = torch.device(environment.device)
    shard = data.open_shard(pipeline.TRAIN_SHARD)
    batches = list(islice(data.Batches(shard, shape.batch_size, shape.block_size), shape.steps))
    matmuls = sorted({devices.product_precision(each.precision, environment.device) for each in levels.values()})
    measured, checks = list[Round](), dict[str, StepCheck]()
    which = f"process {index + 1}/{processes}, " if processes > 1 else ""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # starts only if a remote arm uses it
        apart = [name for name, row in levels.items() if capabilities.needs_own_process(row, environment)]
        arms = turns.place_arms(params, environment, micro_batch, levels, apart, process)
        for name in turns.warm_up(arms, batches[0], device, seed, any(row.cuda_graphs for row in levels.values())):
            print(f"benchmark: {which}warming up {name}", flush=True)
        for result in turns.measure(arms, batches, device, rounds, seconds, seed, matmuls):
            measured.append(result.model_copy(update={"process": index}))
            times = "  ".join(f"{name} {step_ms:,.0f}" for name, step_ms in result.step_ms.items())
            print(f"benchmark: {which}round {len(measured)}/{rounds}, ms per step: {times}", flush=True)
        for arm in arms[:-1] if index == 0 else []:  # the last, the control, repeats the baseline
            checks[arm.name] = check(arm, levels[arm.name].precision, batches[0], device, params)
        profile(arms if index == processes - 1 and params.profile else [], batches[0], device)
    return measured, checks


@ledger.phase("validation")
def check(arm: Arm | RemoteArm, precision: str, batch: loop.Batch, device: torch.device, params: Params) -> StepCheck:
    """Return the errors of an arm's steps; raise UserError if they are larger than rounding."""
    result = arm.run(step_check.check, batch, device, params.size.learning_rate, params.optimizer)
    about = f"gradient off by {result.gradient:.1e} ({result.gradient_of}), update by {result.update:.1e}"
    print(f"benchmark: checked {arm.name}: {about}", flush=True)
    if fault := result.fault(precision):
        fix = "fix its code in src/gpt2_ladder; if you changed nothing, tell us which machine this is"
        raise UserError(f"benchmark: level '{arm.name}' computes a wrong step: {fault}; {fix}")
    return result


def estimate_minutes(levels: Mapping[str, Switches], rounds: int, processes: int) -> float:
    """Estimate the minutes of a benchmark in several processes from the trainings of the levels."""
    results = {name: read_metrics(name) for name in levels if name != CONTROL}
    step_s = [results.get(name, results[BASELINE])["step_ms"] / 1000 for name in levels]
    compilations = 10 * sum(row.compile for row in levels.values())  # from the cache
    return processes * (START_SECONDS + compilations + (rounds + 2) * sum(step_s)) / 60


def read_levels() -> tuple[dict[str, Switches], int]:
    """Return the switches of the control and of every level that passed parity, and the micro-batch of all."""
    parity = files.read_json(pipeline.PARITY)
    levels = {name: Switches(**level["switches"]) for name, level in parity["levels"].items()}
    return {**levels, CONTROL: levels[parity["baseline"]]}, parity["micro_batch"]


def profile(arms: Sequence[Arm | RemoteArm], batch: loop.Batch, device: torch.device) -> None:
    """Profile one step of every arm except the control; write the costs of its operators and its trace."""
    shutil.rmtree(pipeline.TRACES, ignore_errors=True)
    pipeline.TRACES.mkdir()
    operators = {
        arm.name: arm.run(profile_arm, batch, device, pipeline.TRACES / f"{arm.name}.json.gz")
        for arm in arms
        if arm.name != CONTROL
    }
    content = {name: [asdict(operator) for operator in costs] for name, costs in operators.items()}
    files.write_json(pipeline.PROFILE, content)
    spent = {name: profiling.device_time(pipeline.TRACES / f"{name}.json.gz") for name in operators}
    files.write_json(pipeline.DEVICE_TIME, {name: asdict(time) for name, time in spent.items() if time})


def profile_arm(arm: Arm, batch: loop.Batch, device: torch.device, trace: Path) -> list[Operator]:
    """Return the operators of one step of `arm`, the costliest first, and write its trace."""
    return profiling.profile_step(partial(arm.step, batch, device), trace)


if __name__ == "__main__":
    run(main)
