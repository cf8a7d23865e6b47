"""Find how many rows of a batch fit into memory at once: one whole step of every speed level, before any is trained.

Levels that are compared train with the same micro-batch: the largest that fits all of them, and the benchmark, which
holds them all. Compiled levels are tried uncompiled; compilation would take minutes, and fuses memory away.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from gpt2_ladder import params_yaml
from gpt2_ladder.config import GPTConfig, Params, Switches, UserError
from gpt2_ladder.measuring import planning, turns
from gpt2_ladder.model import count_bytes
from gpt2_ladder.training import devices, loop, runtime
from pipeline import PROBE, read_environment, run, write_json


def main() -> None:
    params, environment = params_yaml.load(), read_environment()
    devices.check_machine(params.machine, params.rehearsal, environment)
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    levels = {
        name: level
        for name, level in params.levels.items()
        if level.group == "speed" and devices.why_skipped(level, environment, params.run_slow_levels) is None
    }
    micro_batch = find_micro_batch(params, levels, device)
    print(f"probe: {micro_batch} of {params.shape('speed').batch_size} rows at a time", flush=True)
    write_json(PROBE, {"micro_batch": micro_batch})


def find_micro_batch(params: Params, levels: Mapping[str, Switches], device: torch.device) -> int:
    """Return the largest of batch_size, half of it, and so on, at which a step of each of `levels` fits into memory.

    What is predicted not to fit is not tried: a CPU does not refuse memory, the system kills who asks for too much.

    Raises:
        UserError: one row is too much; it says what would fit.
    """
    shape, free, cuda = params.shape("speed"), devices.free_memory(device), devices.allocates_like_cuda(device)
    micro_batch, ids = shape.batch_size, torch.zeros(1, dtype=torch.int64).expand(shape.batch_size, shape.block_size)
    weights = turns.Weights(params.seed, params.size.learning_rate, params.optimizer, device)
    distinct: dict[tuple[GPTConfig, bool, bool], str] = {}
    shapes: dict[tuple[int, bool, bool], tuple[tuple[GPTConfig, bool, bool], str]] = {}
    for name, switches in levels.items():
        network, bf16, fused = params.gpt(switches), switches.precision == "bf16", switches.fused_adamw
        distinct.setdefault((network, bf16, fused), name)
        shapes.setdefault((network.vocab_size, network.tie_weights, fused), ((network, bf16, fused), name))
    # one of every shape first, so that all weights and AdamW's state exist when the others take their step
    held = sum(count_bytes(network, 4) for (network, _, _), _ in shapes.values())
    for (network, bf16, fused), name in (*shapes.values(), *distinct.items()):
        room = free - (held - count_bytes(network, 4))
        need = partial(_predict, network, bf16, batch_size=shape.batch_size, cuda=cuda)
        try:
            fitting = (rows for rows in _halves(micro_batch) if need(rows, shape.block_size) <= room)
            if not (micro_batch := next(fitting, 0)):
                raise UserError("one row is predicted to be too much")
            step = partial(_take_step, weights, network, bf16, fused, ids, device)
            _, micro_batch = loop.within_memory(step, micro_batch, device)
        except UserError as error:
            block_size = next((size for size in _halves(shape.block_size // 2) if need(1, size) <= room), None)
            mend = "not even one token would fit: free memory, or take model: tiny"
            if block_size:
                mend = f"machines.{params.machine}.block_size: {block_size} would fit"
            raise UserError(f"probe: level '{name}', {free / 2**30:.1f} GiB free: {error}; {mend}") from None
    return micro_batch


def _predict(network: GPTConfig, bf16: bool, rows: int, block_size: int, *, batch_size: int, cuda: bool) -> int:
    """Return the bytes of a step that takes `rows` of `batch_size` rows at a time."""
    micro_batches = 1 if rows == batch_size else 2
    return planning.trace_step(network, bf16, rows, block_size, cuda, micro_batches).peak_bytes


def _take_step(
    weights: turns.Weights,
    network: GPTConfig,
    bf16: bool,
    fused: bool,
    ids: torch.Tensor,
    device: torch.device,
    rows: int,
) -> None:
    model, optimizer = weights.lend(network, fused)
    autocast = runtime.set_precision("bf16" if bf16 else "fp32", device)
    loop.train_step(model, optimizer, (ids, ids), autocast, device, rows)


def _halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


if __name__ == "__main__":
    run(main)
