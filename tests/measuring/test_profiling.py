"""What the profiler says of a step whose operators are known."""

import gzip
import json

import torch
from torch.profiler import ProfilerActivity

from gpt2_ladder.measuring import profiling
from helpers import processes

ONLY_CPU = [ProfilerActivity.CPU]


def test_the_costliest_operator_comes_first_and_the_trace_is_kept(tmp_path):
    large, small = torch.randn(512, 512), torch.randn(8)
    trace = tmp_path / "a" / "step.json.gz"
    found = profiling.profile_step(lambda: (large @ large, small + 1, small + 2), ONLY_CPU, trace)
    assert found[0].name == "aten::mm"
    assert found[0].calls == 1
    assert found[0].self_ms > 0.1  # 0.27 GFLOP: a tenth of a millisecond would be 2.7 TFLOP/s
    by_name = {operator.name: operator for operator in found}
    assert by_name["aten::add"].calls == 2
    assert [operator.self_ms for operator in found] == sorted((o.self_ms for o in found), reverse=True)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}


PROFILE = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity
from gpt2_ladder import files, profiling
files.replacing = lambda path: nullcontext([path])
for name in ("step.json.gz", "no/such/folder/step.json"):
    profiling.profile_step(lambda: torch.ones(3) + 1, [ProfilerActivity.CPU], Path(sys.argv[1]) / name)
"""


def test_kineto_prints_its_errors_and_not_its_usdt_lines(tmp_path):
    (line,) = processes.run(PROFILE, arguments=[str(tmp_path)], stderr=True).splitlines()
    assert "Failed to open" in line
    assert "no/such/folder/step.json" in line


def test_a_profile_without_any_operator_says_how_to_find_out_why(tmp_path, capsys):
    assert profiling.profile_step(lambda: None, ONLY_CPU, tmp_path / "step.json") == []
    assert "step.json: torch's profiler recorded nothing; KINETO_LOG_LEVEL=0 shows why" in capsys.readouterr().out


def test_inductors_kernels_go_by_one_name(tmp_path):
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.cos()).exp() + 1

    compiled, x = torch.compile(step), torch.randn(64, 64)
    compiled(x)
    found = profiling.profile_step(lambda: compiled(x), ONLY_CPU, tmp_path / "step.json.gz")
    names = {operator.name for operator in found}
    assert profiling.FUSED in names
    assert not {"aten::sin", "aten::mul"} & names
