"""Profile a training step with torch.profiler."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from gpt2_ladder import files
from gpt2_ladder.measuring.cost import Operator

FUSED = "fused by torch.compile"  # common name of all Inductor kernels; their own names differ between graphs
# first words of a Triton kernel's name on a GPU, and of a graph's name on a CPU, whose C++ kernels have no names
INDUCTOR = ("triton_", "## Call CompiledFxGraph")

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events
LONG_GAP_US = 5  # longer gaps between kernels end when the host launches the next one


@dataclass(frozen=True)
class DeviceTime:
    """How a GPU spent the time of one step's clock, in milliseconds."""

    busy_ms: float  # at least one kernel, copy or fill ran
    idle_ms: float  # nothing ran
    long_gaps_ms: float  # the part of idle_ms in gaps of over LONG_GAP_US: the GPU waited for the host


def device_time(trace: Path) -> DeviceTime | None:
    """Return how the GPU spent the step in `trace`, which profile_step wrote; None for a step on a CPU.

    The clock runs from the end of the first cudaDeviceSynchronize to the end of the second, as in loop.timed_step.
    """
    events = [event for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if "dur" in event]
    ends = sorted(event["ts"] + event["dur"] for event in events if event["name"] == "cudaDeviceSynchronize")
    if len(ends) < 2:
        return None
    start, end = ends[:2]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in ON_DEVICE)
    gaps, reached = [], start
    for first, last in (*spans, (end, end)):
        gaps.append(max(0.0, min(first, end) - reached))
        reached = max(reached, last)
    idle, long_gaps = sum(gaps), sum(gap for gap in gaps if gap > LONG_GAP_US)
    return DeviceTime((end - start - idle) / 1000, idle / 1000, long_gaps / 1000)


def profile_step(step: Callable[[], object], trace: Path) -> list[Operator]:
    """Profile one call of `step`, write the trace to `trace`, and return the operators, the costliest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # hides Kineto's USDT lines (level 5), not its errors
    with profile() as profiler:
        step()
    with files.replacing(trace) as (temporary,):
        profiler.export_chrome_trace(str(temporary))
    on_gpu = ProfilerActivity.CUDA in supported_activities()
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
