"""Compare any two levels of results/benchmark.json, or this machine with another one.

python -m pipeline.tools.compare flash bf16             how many times as fast flash is as bf16 here
python -m pipeline.tools.compare other/benchmark.json   the ladder here and there, side by side
"""

from pathlib import Path

from pydantic import ValidationError

from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import tables
from pipeline import BENCHMARK, run


def main(*arguments: str) -> None:
    if len(arguments) == 2:
        level, over = arguments
        here = read(BENCHMARK)
        found = here.compare(level, over, here.noise())
        more = f" (about {found['rounds_to_settle']:,} rounds would settle it)" if found["rounds_to_settle"] else ""
        print(
            f"{level} over {over}: {here.gain(level, over)} times as fast, {found['verdict']}{more}; {describe(here)}"
        )
    elif len(arguments) == 1:
        here, there = read(BENCHMARK), read(Path(arguments[0]))
        print(f"here:  {describe(here)}\nthere: {describe(there)}\n")
        print(tables.markdown_table(tables.side_by_side(here, there), text_columns=1))
    else:
        raise UserError(f"{len(arguments)} arguments: give two levels, or the benchmark.json of another machine")


def read(path: Path) -> Measurement:
    """Return the measurement at `path`."""
    try:
        return Measurement.model_validate_json(path.read_bytes())
    except (IsADirectoryError, ValidationError) as error:
        raise UserError(f"{path}: not a benchmark.json of this project ({' '.join(str(error).split()):.200})") from None


def describe(found: Measurement) -> str:
    """Say in a line where and how `found` was measured."""
    machine = found.environment
    return (
        f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}, {found.model}, "
        f"B={found.batch_size}, T={found.block_size}, {len(found.rounds)} rounds, control {found.noise()}"
    )


if __name__ == "__main__":
    run(main)
