"""A GPU that does not exist: its work takes time on a clock of its own, and the host does not wait for it."""

import math
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CUDA = torch.device("cuda")


class FakeGPU:
    """Replace the clock and torch's functions for a GPU. Only waiting for this GPU, or the test, moves the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = self.idle_at = 0.0  # seconds; from `idle_at` on, all work is finished
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait_until(self.idle_at))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch, "stack", self.stack)

    def launch(self, seconds: float) -> None:
        """Give the GPU work for `seconds`."""
        self.idle_at = max(self.now, self.idle_at) + seconds

    def wait_until(self, moment: float) -> None:
        """Let the host wait."""
        self.now = max(self.now, moment)

    def number(self, value: float) -> Any:
        """Return a number that the work launched until now computes."""
        return SimpleNamespace(value=value, device=CUDA)

    def stack(self, numbers: Sequence[Any]) -> Any:
        """Return numbers whose copy on the host has no values before the GPU has computed them."""
        ready = self.idle_at
        copy = SimpleNamespace(tolist=lambda: [n.value if self.now >= ready else math.nan for n in numbers])
        return SimpleNamespace(to=lambda *_, **__: copy)


class Event:
    """A stand-in for torch.cuda.Event."""

    def __init__(self, gpu: FakeGPU):
        self.gpu, self.at = gpu, math.nan

    def record(self, stream: None) -> None:
        self.at = max(self.gpu.now, self.gpu.idle_at)

    def synchronize(self) -> None:
        self.gpu.wait_until(self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert max(self.at, end.at) <= self.gpu.now, "device not ready"  # the error of a real event
        return (end.at - self.at) * 1000
