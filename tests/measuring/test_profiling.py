"""Profiles of steps whose operators are known."""

import gzip
import json

import pytest
import torch

from gpt2_ladder.measuring import profiling
from helpers import processes


def test_the_costliest_operator_comes_first_and_a_trace_is_written(tmp_path):
    large, small = torch.randn(512, 512), torch.randn(8)
    _ = large @ large, small + 1  # the first call of an operator takes longer
    trace = tmp_path / "a" / "step.json.gz"
    operators = profiling.profile_step(lambda: (large @ large, small + 1, small + 2), trace)
    assert (operators[0].name, operators[0].calls) == ("aten::mm", 1)
    assert operators[0].self_ms > 0.1  # 0.27 GFLOP: a tenth of a millisecond would be 2.7 TFLOP/s
    assert {operator.name: operator.calls for operator in operators}["aten::add"] == 2
    assert [operator.self_ms for operator in operators] == sorted((o.self_ms for o in operators), reverse=True)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}


def event(name: str, start: float, duration: float, category: str = "kernel") -> dict:
    return {"name": name, "ts": start, "dur": duration, "cat": category}


def test_a_gpus_idle_time_is_split_into_long_and_short_gaps(tmp_path):
    synchronized = [event("cudaDeviceSynchronize", *times, "cuda_runtime") for times in ((0, 10), (60, 50), (111, 1))]
    device = [
        event("batch", 2, 3, "gpu_memcpy"),  # before the clock starts at 10
        event("a", 20, 30),  # after 10 us
        event("b", 40, 15),  # on another stream; ends at 55
        event("zeros", 57, 23, "gpu_memset"),  # after 2 us
        event("c", 80, 22),  # the clock stops at 110, 8 us later
        {"name": "a marker without a duration", "ts": 30},
        event("mm", 12, 90, "cpu_op"),
    ]
    trace = tmp_path / "trace.json.gz"
    for events, expected in (
        ([*device, *synchronized], profiling.DeviceTime(0.080, 0.020, 0.018)),
        (device, None),  # a CPU does not synchronize
    ):
        trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
        assert profiling.device_time(trace) == expected


PROFILE = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from gpt2_ladder import files
from gpt2_ladder.measuring import profiling
files.replacing = lambda path: nullcontext([path])
for name in ("step.json.gz", "no/such/folder/step.json"):
    profiling.profile_step(lambda: torch.ones(3) + 1, Path(sys.argv[1]) / name)
"""


@pytest.mark.slow
def test_kinetos_errors_are_shown_and_its_usdt_lines_hidden(tmp_path):
    (line,) = processes.run(PROFILE, arguments=[str(tmp_path)], stderr=True).splitlines()
    assert "Failed to open" in line
    assert "no/such/folder/step.json" in line


def test_an_empty_profile_explains_how_to_see_the_reason(tmp_path, capsys):
    assert profiling.profile_step(lambda: None, tmp_path / "step.json") == []
    message = "step.json: torch's profiler recorded nothing; set KINETO_LOG_LEVEL=0 to see why"
    assert message in capsys.readouterr().out


@pytest.mark.slow
def test_inductors_kernels_have_one_name(tmp_path):
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.cos()).exp() + 1

    compiled, x = torch.compile(step), torch.randn(64, 64)
    compiled(x)
    operators = profiling.profile_step(lambda: compiled(x), tmp_path / "step.json.gz")
    names = {operator.name for operator in operators}
    assert profiling.FUSED in names
    assert not {"aten::sin", "aten::mul"} & names
