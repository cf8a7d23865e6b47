"""Compare two levels of results/benchmark.json, or this machine with another one.

python -m pipeline.tools.compare flash bf16             how much faster flash is than bf16 on this machine
python -m pipeline.tools.compare other/benchmark.json   the ladders of both machines, side by side
"""

from pathlib import Path

from pydantic import ValidationError

from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import tables
from pipeline import BENCHMARK, run


def main(*arguments: str) -> None:
    if len(arguments) == 2:
        level, base = arguments
        here = read(BENCHMARK)
        result = here.compare(level, base, here.noise())
        rounds = result["rounds_to_settle"]
        more = f" (about {rounds:,} rounds would settle it)" if rounds else ""
        print(
            f"{level} over {base}: {here.gain(level, base)} times as fast, {result['verdict']}{more}; {describe(here)}"
        )
    elif len(arguments) == 1:
        here, there = read(BENCHMARK), read(Path(arguments[0]))
        print(f"this machine:  {describe(here)}\nother machine: {describe(there)}\n")
        print(tables.markdown_table(tables.side_by_side(here, there), text_columns=1))
    else:
        raise UserError(f"{len(arguments)} arguments: name two levels, or the benchmark.json of another machine")


def read(path: Path) -> Measurement:
    """Read a benchmark.json; raise UserError if it is not one."""
    try:
        return Measurement.model_validate_json(path.read_bytes())
    except (IsADirectoryError, ValidationError) as error:
        raise UserError(f"{path}: not a benchmark.json of this project ({' '.join(str(error).split()):.200})") from None


def describe(measurement: Measurement) -> str:
    """Describe the machine and the settings of a measurement in one line."""
    machine = measurement.environment
    return (
        f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}, {measurement.model}, "
        f"B={measurement.batch_size}, T={measurement.block_size}, {len(measurement.rounds)} rounds, "
        f"control {measurement.noise()}"
    )


if __name__ == "__main__":
    run(main)
