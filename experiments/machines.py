"""Write the table of several machines' ladders into README.md: `PYTHONPATH=src:. python experiments/machines.py`.

Every number is a ratio within one machine, except in the last two rows.
"""

import statistics
from itertools import pairwise
from pathlib import Path

from experiments import pages
from gpt2_ladder import params_yaml
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import tables

README = Path("README.md")
MACHINES = {  # named here, because the first two environments do not distinguish processors of one name
    "AMD EPYC, avx512_bf16": Path("experiments/runs/benchmark-1.json"),
    "Intel Xeon, amx_bf16": Path("experiments/runs/xeon-amx.json"),
    "Intel(R) Xeon(R) Processor, avx512_bf16": Path("experiments/runs/xeon-avx512.json"),
}


def main() -> None:
    """Write the table."""
    levels = {name: level for name, level in params_yaml.load().levels.items() if level.group == "speed"}
    baseline = next(iter(levels))
    runs = [Measurement.model_validate_json(path.read_text()) for path in MACHINES.values()]

    def cell(run: Measurement, level: str, over: str) -> str:
        return tables.gain_cell(run.compare(level, over, run.noise()) if level in run.levels else None)

    def tokens_per_second(run: Measurement) -> float:
        return run.batch_size * run.block_size * 1000 / statistics.median(run.step_ms(baseline))

    def peak(run: Measurement, precision: str) -> float:
        return statistics.median(step.matmul_tflops[precision] for step in run.rounds)

    rows = [["level", "switch that changes", *MACHINES]]
    for previous, level in pairwise(levels):
        change = tables.switch_that_changes(levels[level], levels[previous])
        rows.append([f"[`{level}`](docs/levels/{level}.md)", change, *(cell(run, level, previous) for run in runs)])
    rows.append([f"the last over `{baseline}`", "all", *(cell(run, run.levels[-1], baseline) for run in runs)])
    rows.append([f"`{baseline}` over itself", "none", *(str(run.noise()) for run in runs)])
    rows.append([f"`{baseline}`, tokens/s", "", *(f"{tokens_per_second(run):,.0f}" for run in runs)])
    peaks = (f"{peak(run, 'fp32'):.2f}, {peak(run, 'bf16'):.2f}" for run in runs)
    rows.append(["a bare product, TFLOP/s in fp32, bf16", "", *peaks])
    counts = ", ".join(str(len(run.rounds)) for run in runs)
    text = f"{tables.markdown_table(rows)}\n\nTwo cores each, 2 x 256 tokens a step, {counts} rounds."
    print(text)
    pages.put(README, "machines", text)


if __name__ == "__main__":
    main()
