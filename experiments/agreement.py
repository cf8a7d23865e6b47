"""Check whether repeated benchmarks agree: `PYTHONPATH=src python experiments/agreement.py RUN.json RUN.json RUN.json`.

For the control and for every level over the previous one, the table shows the gain of each run, the gain over the
rounds of all runs, and whether each run is within the pooled interval around that (the root mean square of the runs'
intervals, in logarithms).
"""

import math
import sys
from pathlib import Path

from gpt2_ladder.measuring.gains import Gain, Measurement, gain


def half_width(interval: Gain) -> float:
    """Return half of the interval's width in logarithms."""
    return (math.log(interval.high) - math.log(interval.low)) / 2


def main(*paths: str) -> None:
    """Print the table."""
    runs = [Measurement.model_validate_json(Path(path).read_text()) for path in paths]
    levels, control = runs[0].levels, runs[0].control
    pairs = [(levels[0], control), *zip(levels[1:], levels[:-1], strict=True), (levels[-1], levels[0])]
    print(f"| | {' | '.join(f'run {i + 1}' for i in range(len(runs)))} | all rounds | agree within |")
    print(f"|---|{'---:|' * (len(runs) + 2)}")
    for level, over in pairs:
        separate = [run.gain(level, over) for run in runs]
        together = gain(*([ms for run in runs for ms in run.step_ms(name)] for name in (over, level)))
        pooled = math.sqrt(sum(half_width(each) ** 2 for each in separate) / len(separate))
        farthest = max(abs(math.log(each.ratio / together.ratio)) for each in separate)
        agreement = f"{math.expm1(farthest):.1%} of {math.expm1(pooled):.1%}: {'yes' if farthest <= pooled else 'NO'}"
        cells = [f"{each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in (*separate, together)]
        print(f"| {level} over {over} | {' | '.join(cells)} | {agreement} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
