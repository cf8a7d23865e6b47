"""Compare the memory that `make plan` predicts with measurements: `PYTHONPATH=src python experiments/memory.py`.

Each measurement trains two steps in its own process. "allocated" is the peak of torch's CPU allocator, from
torch.profiler; "resident" is the growth of the process, which includes memory that torch's allocator does not see.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch.profiler import profile

from gpt2_ladder.config import GPTConfig
from gpt2_ladder.measuring import planning
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop, runtime

CPU = torch.device("cpu")
SIZES = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 1024},
    "mid": {"n_layer": 6, "n_head": 8, "n_embd": 512, "n_positions": 1024},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
}
SHAPE = (2, 256)
MIB = 2**20


def allocated_peak(config: GPTConfig, precision: str, batch_size: int, block_size: int) -> int:
    """Return the peak bytes of torch's CPU allocator in a step, including its kernels' workspaces."""
    step, allocated = prepare(config, precision, batch_size, block_size)
    with profile(profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return allocated + peak


def resident_growth(config: GPTConfig, precision: str, batch_size: int, block_size: int) -> int:
    """Return by how many bytes this process grows, at its peak, when it builds a network and trains two steps."""
    (torch.randn(256, 256) @ torch.randn(256, 256)).sum()  # loads libraries, which are not counted
    before = psutil.Process().memory_info().rss
    step, _ = prepare(config, precision, batch_size, block_size)
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def prepare(config: GPTConfig, precision: str, batch_size: int, block_size: int) -> tuple[Callable[[], object], int]:
    """Return the second step of a new network, and the bytes allocated before it: weights, AdamW's state, buffers."""
    model = GPT(config)
    optimizer = loop.make_optimizer(model, 1e-3, planning.SETTINGS)
    ids = torch.randint(config.vocab_size, (batch_size, block_size))
    autocast = runtime.set_precision(precision, CPU)
    step = partial(loop.timed_step, model, optimizer, (ids, ids), autocast, CPU, batch_size)
    step()
    optimizer.zero_grad()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return step, 3 * parameters + sum(buffer.numel() for buffer in model.buffers())


def main() -> None:
    """Print the table, row by row."""
    print(
        f"| size | attention | precision | predicted MiB | allocated MiB | resident MiB |  (B={SHAPE[0]}, T={SHAPE[1]})"
    )
    for size, sizes in SIZES.items():
        for attention in ("eager", "flash"):
            for precision in ("fp32", "bf16"):
                config = GPTConfig(**sizes, attention=attention)
                predicted = planning.trace_step(config, precision, *SHAPE, cuda=False).peak_bytes / MIB
                cells = []
                for what in ("allocated", "resident"):
                    command = [sys.executable, __file__, size, attention, precision, what]
                    output = subprocess.run(command, capture_output=True, check=True).stdout
                    mib = json.loads(output.splitlines()[-1])
                    cells.append(f"{mib:,.0f} ({mib / predicted - 1:+.1%})")
                print(f"| {size} | {attention} | {precision} | {predicted:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        size, attention, precision, what = sys.argv[1:]
        measure = {"allocated": allocated_peak, "resident": resident_growth}[what]
        print(json.dumps(measure(GPTConfig(**SIZES[size], attention=attention), precision, *SHAPE) / MIB))
