"""Compare two levels in results/benchmark.json, or compare this machine with another one.

python -m pipeline.tools.compare flash bf16             how much faster flash is than bf16 on this machine
python -m pipeline.tools.compare machines/h100-sxm.json  the gains on both machines, side by side
"""

from pathlib import Path

from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import gallery, tables
from pipeline import BENCHMARK, read_json, run


def main(*arguments: str) -> None:
    if len(arguments) == 2:
        level, base = arguments
        measured = Measurement.model_validate(read_json(BENCHMARK))
        result = measured.compare(level, base, measured.noise())
        rounds = result["rounds_to_settle"]
        more = f" (a clear result needs about {rounds:,} rounds)" if rounds else ""
        print(f"{level} is {measured.gain(level, base)} times as fast as {base}: {result['verdict']}{more}")
        print(f"measured on {describe(measured)}")
    elif len(arguments) == 1:
        this, other = Measurement.model_validate(read_json(BENCHMARK)), gallery.read(Path(arguments[0])).benchmark
        print(f"this machine:  {describe(this)}\nother machine: {describe(other)}\n")
        print(tables.markdown_table(tables.side_by_side(this, other), text_columns=1))
    else:
        raise UserError(f"{len(arguments)} arguments: name two levels, or a file of machines/")


def describe(measurement: Measurement) -> str:
    """Describe the machine and the settings of a measurement in one line."""
    machine = measurement.environment
    return (
        f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}, {measurement.model}, "
        f"B={measurement.batch_size}, T={measurement.block_size}, {len(measurement.rounds)} rounds, "
        f"control gain {measurement.noise()}"
    )


if __name__ == "__main__":
    run(main)
