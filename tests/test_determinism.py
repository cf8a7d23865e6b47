"""The same bits in two processes, with `deterministic: true`, at every kind of level that needs no compiler."""

import os
import subprocess
import sys

from conftest import REPOSITORY

TRAINING = """
import hashlib
import torch
from conftest import random_ids, tiny
from gpt2_ladder import devices, runtime, training
from gpt2_ladder.config import AdamW
from gpt2_ladder.model import GPT
device = devices.open_device("cpu", 2, 1337, deterministic=True)
for seed, precision in ((1337, "fp32"), (1337, "bf16"), (1338, "fp32")):
    for attention in ("eager", "flash"):
        model = GPT(tiny(attention=attention, n_embd=64, vocab_size=1000), seed)
        optimizer = training.make_optimizer(model, 1e-3, AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1))
        batches = [(random_ids(4, 32, 1000, i), random_ids(4, 32, 1000, i + 9)) for i in range(5)]
        autocast = runtime.set_precision(precision, device)
        losses = [step.loss for step in training.train(model, optimizer, batches, autocast, device, 4)]
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
        print(precision, attention, losses, weights.hexdigest())
"""


def train() -> list[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}:{REPOSITORY / 'tests'}"}
    command = [sys.executable, "-c", TRAINING]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_two_processes_give_the_same_losses_and_weights_to_the_bit():
    first = train()
    assert train() == first
    assert len(set(first)) == 6  # another precision, kernel or seed gives other bits
