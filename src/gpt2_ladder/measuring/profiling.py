"""Profile a training step with torch.profiler."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from gpt2_ladder import files

FUSED = "fused by torch.compile"  # common name of all Inductor kernels; their own names differ between graphs
# first words of a Triton kernel's name on a GPU, and of a graph's name on a CPU, whose C++ kernels have no names
INDUCTOR = ("triton_", "## Call CompiledFxGraph")


@dataclass(frozen=True)
class Operator:
    """The cost of one operator in one step."""

    name: str  # torch's name of the operator
    calls: int
    self_ms: float  # without the operators that it calls; on a GPU, the time of the kernels that it launches


def profile_step(step: Callable[[], object], activities: Sequence[ProfilerActivity], trace: Path) -> list[Operator]:
    """Profile one call of `step`, write the trace to `trace`, and return the operators, the costliest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # hides Kineto's USDT lines (level 5), not its errors
    with profile(activities=activities) as profiler:
        step()
    with files.replacing(trace) as (temporary,):
        profiler.export_chrome_trace(str(temporary))
    on_gpu = ProfilerActivity.CUDA in activities
    calls: Counter[str] = Counter()
    self_us: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type.name != "CPU":
            continue  # a kernel: its time is counted in the operator that launched it
        name = FUSED if event.key.startswith(INDUCTOR) else event.key
        calls[name] += event.count
        self_us[name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    if not any(self_us.values()):
        print(f"{trace}: torch's profiler recorded nothing; set KINETO_LOG_LEVEL=0 to see why", flush=True)
    return [Operator(name, calls[name], us / 1000) for name, us in self_us.most_common() if us > 0]
