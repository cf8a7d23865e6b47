"""Profile a training step with torch.profiler."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from gpt2_ladder import files

FUSED = "fused by torch.compile"  # one name for all of Inductor's kernels, whose own names differ between graphs
# Triton's kernels on a GPU; on a CPU the C++ kernels have no names, and their time is that of the graph that calls them
INDUCTOR = ("triton_", "## Call CompiledFxGraph")


@dataclass(frozen=True)
class Operator:
    """The cost of one operator in one step, by torch's name.

    `self_ms` excludes the operators that it called; on a GPU it is the time of the kernels it launched.
    """

    name: str
    calls: int
    self_ms: float


def profile_step(step: Callable[[], object], activities: Sequence[ProfilerActivity], trace: Path) -> list[Operator]:
    """Run `step` once, write its trace to `trace`, and return its operators, the costliest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # hides Kineto's USDT lines, which have level 5; errors are shown
    with profile(activities=activities) as profiler:
        step()
    with files.replacing(trace) as (temporary,):
        profiler.export_chrome_trace(str(temporary))
    on_gpu = ProfilerActivity.CUDA in activities
    calls: Counter[str] = Counter()
    self_us: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type.name != "CPU":
            continue  # a kernel, whose time is counted with the operator that launched it
        name = FUSED if event.key.startswith(INDUCTOR) else event.key
        calls[name] += event.count
        self_us[name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    if not any(self_us.values()):
        print(f"{trace}: torch's profiler recorded nothing; set KINETO_LOG_LEVEL=0 to see why", flush=True)
    return [Operator(name, calls[name], us / 1000) for name, us in self_us.most_common() if us > 0]
