"""Lay the predictions of `make plan` beside what a step really takes: `PYTHONPATH=src python benchmarks/memory.py`.

Every row is a process of its own, which trains two steps. "allocated" is the most that torch's CPU allocator had given
out at once, from torch.profiler; "resident" is by how much the process grew, with all that no allocator of torch sees.
"""

import json
import resource
import subprocess
import sys

import psutil
import torch
from torch.profiler import profile

from gpt2_ladder import planning, runtime, training
from gpt2_ladder.config import GPTConfig
from gpt2_ladder.model import GPT

CPU = torch.device("cpu")
SIZES = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 1024},
    "mid": {"n_layer": 6, "n_head": 8, "n_embd": 512, "n_positions": 1024},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
}
SHAPE = (2, 256)
MIB = 2**20


def measure(size: str, attention: str, precision: str, profiled: bool) -> float:
    """Return the peak of a step in MiB: torch's own count if `profiled`, else by how much the process grew."""
    (torch.randn(256, 256) @ torch.randn(256, 256)).sum()  # what the first product loads is not the step's
    before = psutil.Process().memory_info().rss
    model = GPT(GPTConfig(**SIZES[size], attention=attention))
    optimizer = training.make_optimizer(model, 1e-3, planning.SETTINGS)
    ids = torch.randint(50257, SHAPE)
    autocast = runtime.set_precision(precision, CPU)
    held = sum(p.numel() * p.element_size() for p in model.parameters()) * 3  # the weights and AdamW's two moments
    held += sum(buffer.numel() for buffer in model.buffers())
    training.train_step(model, optimizer, (ids, ids), autocast, CPU, SHAPE[0])
    if not profiled:
        training.train_step(model, optimizer, (ids, ids), autocast, CPU, SHAPE[0])
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / MIB
    optimizer.zero_grad()
    with profile(profile_memory=True) as profiler:
        training.train_step(model, optimizer, (ids, ids), autocast, CPU, SHAPE[0])
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return (held + peak) / MIB


def main() -> None:
    """Print the table, row by row."""
    print(
        f"| size | attention | precision | predicted MiB | allocated MiB | resident MiB |  (B={SHAPE[0]}, T={SHAPE[1]})"
    )
    for size, sizes in SIZES.items():
        for attention in ("eager", "flash"):
            for precision in ("fp32", "bf16"):
                config = GPTConfig(**sizes, attention=attention)
                predicted = planning.trace_step(config, precision == "bf16", *SHAPE, cuda=False).peak_bytes / MIB
                found = []
                for profiled in ("1", ""):
                    command = [sys.executable, __file__, size, attention, precision, profiled]
                    found.append(
                        json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1])
                    )
                cells = " | ".join(f"{one:,.0f} ({one / predicted - 1:+.1%})" for one in found)
                print(f"| {size} | {attention} | {precision} | {predicted:,.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], bool(sys.argv[4]))))
