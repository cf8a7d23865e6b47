"""The same ladder on several machines, as a table in README.md. `PYTHONPATH=src:. python experiments/machines.py`.

Every number is a ratio within one machine, but for the last two rows.
"""

import statistics
from itertools import pairwise
from pathlib import Path

from experiments import pages
from gpt2_ladder import params_yaml
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import tables

README = Path("README.md")
MACHINES = {  # the first two had environments that did not yet tell processors of one name apart
    "AMD EPYC, avx512_bf16": Path("experiments/runs/benchmark-1.json"),
    "Intel Xeon, amx_bf16": Path("experiments/runs/xeon-amx.json"),
    "Intel(R) Xeon(R) Processor, avx512_bf16": Path("experiments/runs/xeon-avx512.json"),
}


def main() -> None:
    """Write the table."""
    levels = {name: level for name, level in params_yaml.load().levels.items() if level.group == "speed"}
    baseline = next(iter(levels))
    found = {name: Measurement.model_validate_json(path.read_text()) for name, path in MACHINES.items()}
    noises = {name: one.noise() for name, one in found.items()}

    def cell(machine: str, level: str, over: str) -> str:
        one = found[machine]
        return tables.gain_cell(one.compare(level, over, noises[machine]) if level in one.levels else None)

    rows = [["level", "switch that changes", *found]]
    for before, level in pairwise(levels):
        change = tables.switch_that_changes(levels[level], levels[before])
        rows.append([f"[`{level}`](docs/levels/{level}.md)", change, *(cell(name, level, before) for name in found)])
    rows.append(
        [f"the last over `{baseline}`", "all", *(cell(name, m.levels[-1], baseline) for name, m in found.items())]
    )
    rows.append([f"`{baseline}` over itself", "none", *map(str, noises.values())])
    ms = {name: statistics.median(one.step_ms(baseline)) for name, one in found.items()}
    tokens = {name: one.batch_size * one.block_size * 1000 / ms[name] for name, one in found.items()}
    rows.append([f"`{baseline}`, tokens/s", "", *(f"{rate:,.0f}" for rate in tokens.values())])
    peaks = {
        name: [statistics.median(one.matmul_tflops[kind] for one in measured.rounds) for kind in ("fp32", "bf16")]
        for name, measured in found.items()
    }
    rows.append(
        ["a bare product, TFLOP/s in fp32, bf16", "", *("{:.2f}, {:.2f}".format(*both) for both in peaks.values())]
    )
    many = ", ".join(str(len(one.rounds)) for one in found.values())
    text = f"{tables.markdown_table(rows)}\n\nTwo cores each, 2 x 256 tokens a step, {many} rounds."
    print(text)
    pages.put(README, "machines", text)


if __name__ == "__main__":
    main()
