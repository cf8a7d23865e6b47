"""Find the micro-batch: how many rows of a batch fit into memory at a time. Try one step of every speed level.

The levels whose only change has no effect on this device are listed, too: they are not trained.
All speed levels and the benchmark, which keeps all levels in memory, use the same micro-batch: the largest that fits.
Compiled levels are tried without compilation, which takes minutes and only lowers the memory. Then, with MANY_CORES,
their networks are compiled at the same time; the trainings find them in torch's cache.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch

from gpt2_ladder import files, ledger
from gpt2_ladder.config import GPTConfig, Switches, UserError
from gpt2_ladder.measuring import planning, turns
from gpt2_ladder.model import count_bytes
from gpt2_ladder.params import Params
from gpt2_ladder.training import capabilities, devices, loop, memory, precisions, runtime
from pipeline import PROBE, read_settings, run

MANY_CORES = 8  # a compilation keeps about one core busy, so fewer cores gain little


@dataclass(frozen=True)
class Kind:
    """The settings of a level that determine how much memory it needs."""

    network: GPTConfig
    precision: str
    fused: bool

    @property
    def shared(self) -> tuple[int, bool, bool]:
        """The settings of weights and optimizer; levels with the same ones share both in turns.SharedWeights."""
        return self.network.vocab_size, self.network.tie_weights, self.fused


def main() -> None:
    params, environment = read_settings()
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    levels = {
        name: level
        for name, level in params.levels.items()
        if level.group == "speed" and capabilities.why_skipped(level, environment, params.run_slow_levels) is None
    }
    micro_batch, batch_size = find_micro_batch(params, levels, device), params.shape("speed").batch_size
    print(f"probe: {micro_batch} of the {batch_size} rows of a batch fit into memory", flush=True)
    parts = math.ceil(batch_size / micro_batch)
    rows = capabilities.rows_without_effect(params.levels, environment, parts)
    if environment.threads >= MANY_CORES:
        acting = {name: capabilities.effective(level, environment, parts) for name, level in levels.items()}
        compile_ahead(params, acting, micro_batch, device)
    files.write_json(PROBE, {"micro_batch": micro_batch, "without_effect": rows})


def find_micro_batch(params: Params, levels: Mapping[str, Switches], device: torch.device) -> int:
    """Return the largest micro-batch (batch_size, half of it, a quarter ...) at which a step of all `levels` fits.

    Steps that are predicted not to fit are not tried, because without enough memory a system kills a CPU's process.
    Raise UserError if one row does not fit; the message has the largest block_size that would fit.
    """
    shape, free, cuda = params.shape("speed"), devices.free_memory(device), devices.allocates_like_cuda(device)
    micro_batch, ids = shape.batch_size, torch.zeros(1, dtype=torch.int64).expand(shape.batch_size, shape.block_size)
    weights = turns.SharedWeights(params, device)
    names: dict[Kind, str] = {}
    for name, switches in levels.items():
        operand = precisions.PRECISIONS[switches.precision].operand
        names.setdefault(Kind(params.gpt(switches), operand, switches.fused_adamw), name)
    first = {kind.shared: kind for kind in reversed(names)}
    # try one level of each set of weights first, so that all weights and AdamW's state exist when others are tried
    total = sum(count_bytes(kind.network, 4) for kind in first.values())
    for kind in (*reversed(first.values()), *names):
        available = free - (total - count_bytes(kind.network, 4))
        fits = partial(planning.fitting_rows, kind.network, kind.precision, cuda=cuda, free=available)
        devices.attention_kernel(kind.network, kind.precision, micro_batch, shape.block_size, device)
        try:
            if not (micro_batch := fits(shape.batch_size, shape.block_size, most=micro_batch)):
                raise UserError("one row is predicted not to fit")
            micro_batch = memory.within_memory(partial(_step, weights, kind, ids, device), micro_batch, device)
        except UserError as error:
            block_size = shape.block_size // 2
            while block_size and not fits(shape.batch_size, block_size, most=1):
                block_size //= 2
            fix = "not even one token fits: free memory, or set model: tiny"
            if block_size:
                fix = f"set machines.{params.machine}.block_size: {block_size}, which fits"
            raise UserError(f"probe: level '{names[kind]}', {free / 2**30:.1f} GiB free: {error}; {fix}") from None
    return micro_batch


def compile_ahead(params: Params, levels: Mapping[str, Switches], micro_batch: int, device: torch.device) -> None:
    """Compile the distinct graphs of `levels` at the same time, as many as fit into memory, into torch's cache.

    `autotune` is left out: it times kernels, for which it needs the GPU for itself.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # not at the top: it imports Dynamo, in a second

    graphs: dict[tuple[GPTConfig, str, bool], tuple[str, Switches]] = {}
    for name, row in levels.items():
        if row.compile and not row.autotune:
            graphs.setdefault((params.gpt(row), row.precision, row.cuda_graphs), (name, row))
    devices.reset_peak_memory(device)
    free, cuda, T = devices.free_memory(device), devices.allocates_like_cuda(device), params.shape("speed").block_size
    operands = [(config, precisions.PRECISIONS[precision].operand) for config, precision, _ in graphs]
    peaks = sorted((planning.trace_step(*each, micro_batch, T, cuda).peak_bytes for each in operands), reverse=True)
    needs = accumulate(peak + planning.RESERVE for peak in peaks)  # of the largest ones at the same time
    count = sum(need <= free for need in needs)
    print(f"probe: compiling {len(graphs)} networks, {max(count, 1)} at a time", flush=True)
    with ledger.phase("compile"), ProcessPoolExecutor(max(count, 1), get_context("spawn")) as pool:
        compiling = {name: pool.submit(compile_network, name, row, micro_batch) for name, row in graphs.values()}
        for name, future in compiling.items():  # an error only costs time: the level's training compiles again
            print(f"probe: {name} {future.exception() or 'is compiled'}", flush=True)
    for choice in Path(cache_dir()).rglob("*.best_config"):  # of kernels that were timed beside other processes
        choice.unlink()


def compile_network(name: str, switches: Switches, micro_batch: int) -> None:
    """Compile one network by a training step."""
    params, environment = read_settings()
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    (arm,) = turns.build_arms(params, {name: switches}, device, micro_batch)
    ids = torch.zeros(micro_batch, params.shape("speed").block_size, dtype=torch.int64)
    arm.step((ids, ids), device)


def _step(weights: turns.SharedWeights, kind: Kind, ids: torch.Tensor, device: torch.device, rows: int) -> None:
    model, optimizer = weights.build(kind.network, kind.fused)
    autocast, scaler = runtime.set_precision(kind.precision, device), runtime.make_scaler(kind.precision, device)
    loop.timed_step(model, optimizer, (ids, ids), autocast, device, rows, scaler)


if __name__ == "__main__":
    run(main)
