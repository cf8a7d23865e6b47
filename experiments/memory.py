"""Lay the predictions of `make plan` beside what a step really takes: `PYTHONPATH=src python experiments/memory.py`.

Every row is a process of its own, which trains two steps. "allocated" is the most that torch's CPU allocator had given
out at once, from torch.profiler; "resident" is by how much the process grew, with all that no allocator of torch sees.
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
    """Return the most bytes that torch's CPU allocator had given out at once in a step, its kernels' own included."""
    step, held = prepare(config, precision, batch_size, block_size)
    with profile(profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return held + peak


def resident_growth(config: GPTConfig, precision: str, batch_size: int, block_size: int) -> int:
    """Return by how many bytes this process grows, at its largest, when it builds a network and trains two steps."""
    (torch.randn(256, 256) @ torch.randn(256, 256)).sum()  # what the first product loads is not the step's
    before = psutil.Process().memory_info().rss
    step, _ = prepare(config, precision, batch_size, block_size)
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def prepare(config: GPTConfig, precision: str, batch_size: int, block_size: int) -> tuple[Callable[[], object], int]:
    """Return the second step of a new network, and the bytes that it finds: weights, AdamW's moments and buffers."""
    model = GPT(config)
    optimizer = loop.make_optimizer(model, 1e-3, planning.SETTINGS)
    ids = torch.randint(config.vocab_size, (batch_size, block_size))
    autocast = runtime.set_precision(precision, CPU)
    step = partial(loop.train_step, model, optimizer, (ids, ids), autocast, CPU, batch_size)
    step()
    optimizer.zero_grad()
    held = sum(p.numel() * p.element_size() for p in model.parameters()) * 3
    return step, held + sum(buffer.numel() for buffer in model.buffers())


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
                found = []
                for what in ("allocated", "resident"):
                    command = [sys.executable, __file__, size, attention, precision, what]
                    found.append(
                        json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1])
                    )
                cells = " | ".join(f"{one:,.0f} ({one / predicted - 1:+.1%})" for one in found)
                print(f"| {size} | {attention} | {precision} | {predicted:,.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        size, attention, precision, what = sys.argv[1:]
        measure = {"allocated": allocated_peak, "resident": resident_growth}[what]
        print(json.dumps(measure(GPTConfig(**SIZES[size], attention=attention), precision, *SHAPE) / MIB))
