"""With `deterministic: true`, two processes compute the same bits at every kind of level that needs no compiler."""

import pytest

from helpers import processes

TRAINING = """
import hashlib
import torch
from helpers.common import random_ids, tiny
from gpt2_ladder.config import AdamW
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, loop, runtime
device = devices.open_device("cpu", 2, 1337, deterministic=True)
for seed, precision in ((1337, "fp32"), (1337, "bf16"), (1338, "fp32")):
    for attention in ("eager", "flash"):
        model = GPT(tiny(attention=attention, n_embd=64, vocab_size=1000), seed)
        optimizer = loop.make_optimizer(model, 1e-3, AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1))
        batches = [(random_ids(4, 32, 1000, i), random_ids(4, 32, 1000, i + 9)) for i in range(3)]
        autocast = runtime.set_precision(precision, device)
        losses = [step.loss for step in loop.train(model, optimizer, batches, autocast, device, 4)]
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
        print(precision, attention, losses, weights.hexdigest())
"""


@pytest.mark.slow
def test_two_processes_compute_the_same_losses_and_weights_to_the_bit():
    output = processes.run(TRAINING)
    assert processes.run(TRAINING) == output
    assert len(set(output.splitlines())) == 6  # another precision, kernel or seed gives other bits
