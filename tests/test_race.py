"""The race: the order of steps, their batches, and the table. Speed itself is not tested."""

import pytest
import torch
import torch.nn.functional as F

from experiments import gpts, race
from experiments.race import Cell
from gpt2_ladder.config import Size
from helpers import processes


def counts(cell: Cell):
    """A contestant whose loss identifies its batch."""
    return lambda x, y: float((x.sum() + 2 * y.sum()).item())


@pytest.mark.slow
def test_contestants_step_on_the_same_batches_in_their_own_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", processes.IMPORTABLE)
    cell = Cell(2, 8, "fp32", compile=False)
    contestants = [("ours", "test_race:counts", True), ("other", "test_race:counts", False)]
    result = race.race(cell, contestants, rounds=3, warm_up=1)
    assert {name: len(times) for name, times in result["step_ms"].items()} == {"ours": 3, "other": 3}
    assert len(result["peak_tflops"]) == 3
    ids = torch.randint(race.VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    assert set(result["first_losses"].values()) == {(ids[:, :-1].sum() + 2 * ids[:, 1:].sum()).item()}


def test_our_contestants_can_be_imported():
    for name in (race.OURS, race.THEIRS):
        module, function = name.split(":")
        assert (module, callable(getattr(race, function))) == (race.__name__, True)


def test_a_network_of_ones_own_can_be_raced(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests run in this process
    monkeypatch.setattr(race, "SIZE", Size(n_layer=1, n_head=2, n_embd=16, n_positions=32))
    ids = torch.randint(race.VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(0))
    step = race.open_contestant(
        f"{gpts.FOLDER / 'mingpt.py'}:GPT", Cell(2, 32, "fp32", compile=False, keep_memory=False)
    )
    calls, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **how: calls.append(args) or cross_entropy(*args, **how))
    losses = [step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]  # without dropout
    assert len(calls) == 3  # not also a loss of ours, which would cost time


def test_the_table_shows_ratios_with_intervals_and_the_share_of_the_peak():
    cell = {"batch_size": 2, "block_size": 256, "precision": "bf16", "compile": True, "keep_memory": True}
    times = {"ours": [1970.0] * 4, "transformers": [2955.0] * 4}
    table = race.table([{"cell": cell, "step_ms": times, "peak_tflops": [0.4] * 4}]).splitlines()
    assert table[0] == "| B x T | precision | compiled | ours ms | over transformers | of the peak |"
    # 394 GFLOP in 1.97 s of 0.4 TFLOP/s
    assert table[2] == "| 2 x 256 | bf16 | yes | 1,970 | 1.50 [1.50, 1.50] | 50% |"
