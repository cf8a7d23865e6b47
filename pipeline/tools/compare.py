"""Compare two levels in results/benchmark.json, or compare this machine with another one.

python -m pipeline.tools.compare flash bf16             how much faster flash is than bf16 on this machine
python -m pipeline.tools.compare trial bf16             how much faster the trial is than bf16
python -m pipeline.tools.compare machines/h100-sxm.json  the gains on both machines, side by side
"""

import math
from pathlib import Path

from gpt2_ladder import files
from gpt2_ladder.config import BASELINE, UserError
from gpt2_ladder.measuring.gains import Gain, Measurement, verdict
from gpt2_ladder.measuring.trials import TRIAL
from gpt2_ladder.reporting import gallery, tables
from pipeline import BENCHMARK, TRIAL_FACTS, run


def main(*arguments: str) -> None:
    if len(arguments) == 2 and TRIAL in arguments and BASELINE not in arguments:
        compare_trial(*arguments)
    elif len(arguments) == 2:
        level, base = arguments
        measured = read_trial() if TRIAL in arguments else read_benchmark()
        result = measured.compare(level, base, measured.noise())
        needed, unit = result["count_to_settle"], "rounds" if measured.processes == 1 else "processes"
        more = f" (a clear result needs about {needed:,} {unit})" if needed else ""
        print(f"{level} is {measured.gain(level, base)} times as fast as {base}: {result['verdict']}{more}")
        print(f"measured on {describe(measured)}")
    elif len(arguments) == 1:
        this, other = read_benchmark(), gallery.read(Path(arguments[0])).benchmark
        print(f"this machine:  {describe(this)}\nother machine: {describe(other)}\n")
        print(tables.markdown_table(tables.side_by_side(this, other), text_columns=1))
    else:
        raise UserError(f"{len(arguments)} arguments: name two levels, or a file of machines/")


def read_benchmark() -> Measurement:
    return Measurement.model_validate(files.read_json(BENCHMARK))


def read_trial() -> Measurement:
    """Return the rounds of the trial and BASELINE. Raise UserError if they were not measured."""
    facts = files.read_json(TRIAL_FACTS)
    if not facts["gain"]:
        raise UserError(f"the trial was not measured: {facts['not_measured']}")
    return Measurement.model_validate(facts["measurement"])


def compare_trial(level: str, base: str) -> None:
    """Print the gain between the trial and a level of the benchmark: the quotient of their gains over BASELINE."""
    trial, benchmark = read_trial(), read_benchmark()
    for key in ("environment", "model", "batch_size", "block_size"):
        if getattr(trial, key) != getattr(benchmark, key):
            raise UserError(f"the trial and the benchmark differ in {key}; run `dvc repro` to measure both again")
    gains = [(trial if name == TRIAL else benchmark).gain(name, BASELINE) for name in (level, base)]
    noise = math.exp(math.hypot(trial.noise().uncertainty, benchmark.noise().uncertainty))
    result = divide(*gains)
    print(f"{level} is {result} times as fast as {base}: {verdict(result, Gain(1, 1 / noise, noise))}")
    print(f"{gains[0]} / {gains[1]}, both over {BASELINE}: measured apart, so the variances of their logarithms add")
    print(f"trial: {describe(trial)}\nlevels: {describe(benchmark)}")


def divide(gain: Gain, other: Gain) -> Gain:
    """Return the quotient of two independent gains, with half-widths of intervals in place of standard deviations."""
    ratio, width = gain.ratio / other.ratio, math.hypot(*(math.log(g.high / g.low) / 2 for g in (gain, other)))
    return Gain(ratio, ratio * math.exp(-width), ratio * math.exp(width))


def describe(measurement: Measurement) -> str:
    machine, count = measurement.environment, measurement.processes
    processes = "one process" if count == 1 else f"{count} processes"
    return (
        f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}, {measurement.model}, "
        f"B={measurement.batch_size}, T={measurement.block_size}, {len(measurement.rounds)} rounds in {processes}, "
        f"control gain {measurement.noise()}"
    )


if __name__ == "__main__":
    run(main)
