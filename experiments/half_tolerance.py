"""Measure how far the losses of right 16-bit trainings are from float32: `python -m experiments.half_tolerance`.

Arguments: a row of `models`, and a learning rate instead of its own. Each seed draws other weights and another text. A
training takes 10 steps on a CPU, whose autocast stands for a GPU's.
"""

import sys
from itertools import islice

import numpy as np
import torch

from gpt2_ladder import params_yaml
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.training import data, devices, loop, runtime

CPU = torch.device("cpu")
B, T, STEPS, SEEDS = 2, 256, 10, 20


def text(seed: int) -> np.ndarray:
    """Return ids in which the next one mostly follows from the previous one: 20 % are random."""
    dice = np.random.default_rng(seed)
    ids = np.zeros(B * T * STEPS + 1, dtype=np.int64)
    drawn, random = dice.integers(50257, size=len(ids)), dice.random(len(ids)) < 0.2
    for position in range(1, len(ids)):
        ids[position] = drawn[position] if random[position] else (5 * ids[position - 1] + 7) % 997
    return ids


def losses(params: Params, precision: str, seed: int) -> tuple[list[float], int]:
    """Return the losses of a training, and how many of its steps were skipped."""
    model = GPT(params.size.gpt(), seed)
    optimizer = loop.make_optimizer(model, params.size.learning_rate, params.optimizer, fused=True)
    batches = islice(data.Batches(text(seed), B, T), STEPS)
    autocast, scaler = runtime.set_precision(precision, CPU), runtime.make_scaler(precision, CPU)
    steps = list(loop.train(model, optimizer, batches, autocast, CPU, B, scaler=scaler))
    return [step.loss for step in steps], sum(not np.isfinite(step.grad_norm) for step in steps)


def main(model: str = "tiny", learning_rate: str = "") -> None:
    """Print the largest difference of each training, in nats, and the largest of all."""
    params = params_yaml.load().model_copy(update={"model": model})
    rate = float(learning_rate or params.size.learning_rate)
    params.models[model] = params.size.model_copy(update={"learning_rate": rate})
    devices.keep_freed_memory(CPU)
    print(f"model {model}, {B} x {T} tokens, {STEPS} steps, learning rate {rate:g}, torch {torch.__version__}")
    print("| seed | fp16 | skipped | bf16 |\n|---:|---:|---:|---:|")
    largest: dict[str, list[float]] = {"fp16": [], "bf16": []}
    for seed in range(SEEDS):
        baseline, _ = losses(params, "fp32", seed)
        skipped = {}
        for precision, found in largest.items():
            curve, skipped[precision] = losses(params, precision, seed)
            found.append(max(abs(a - b) for a, b in zip(curve, baseline, strict=True)))
        print(f"| {seed} | {largest['fp16'][-1]:.2e} | {skipped['fp16']} | {largest['bf16'][-1]:.2e} |", flush=True)
    print(f"| most | {max(largest['fp16']):.2e} | | {max(largest['bf16']):.2e} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
