"""Check that the steps of an arm compute what GPT-2 and AdamW define, in the process that has timed the arm.

A loss curve is a blunt probe: GPT-2 starts with nearly flat attention, so its loss hardly depends on the scale of the
scores. So the network gets random weights with sharp attention and takes two real steps. The loss and all gradients of
the first are compared with those of the plain network in float32, which `verify` compares with transformers'; the
update of the second with AdamW in float64. docs/evidence.md has the faults that this finds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_ladder.config import AdamW, GPTConfig
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, loop

# The weights and the tolerances were chosen together, from the right and the wrong runs of experiments/power.py
STD, SHARPNESS = 0.02, 2.0  # standard deviations: of the matrices, and of the attention's scores
LOSS = {"fp32": 1e-6, "tf32": 3e-4, "bf16": 3e-4, "fp16": 3e-4}  # largest relative error
GRADIENT = {"fp32": 1e-5, "tf32": 2.5e-2, "bf16": 2.5e-2, "fp16": 5e-3}  # TF32's is not measured: at most bfloat16's
UPDATE = 1e-5
SAMPLES = 10_000  # compared entries of each parameter's update
ULP = torch.finfo(torch.float32).eps  # AdamW rounds each weight twice, by up to half of this, which is not counted


@dataclass(frozen=True)
class StepCheck:
    """The relative errors of an arm's steps. Gradients and updates are compared by the norm of each parameter."""

    loss: float
    gradient: float  # of the worst parameter
    gradient_of: str
    update: float
    update_of: str

    def fault(self, precision: str) -> str | None:
        """Return what differs by more than rounding explains, or None. NaN differs."""
        for what, error, most in (
            ("the loss", self.loss, LOSS[precision]),
            (f"the gradient of {self.gradient_of}", self.gradient, GRADIENT[precision]),
            (f"AdamW's update of {self.update_of}", self.update, UPDATE),
        ):
            if not error <= most:
                return f"{what} is off by {error:.1e}, where {most:g} is allowed"
        return None


def check(arm: Arm, batch: loop.Batch, device: torch.device, learning_rate: float, adamw: AdamW) -> StepCheck:
    """Take two steps of `arm` on `batch`, a pair of int64 (B, T), from sharp weights; return their errors."""
    arm.optimizer.zero_grad()
    batch = devices.send(batch, device)
    plain = arm.model.config.model_copy(update={"attention": "eager", "chunked_loss": False})
    expected_loss, expected = plain_gradients(plain, *batch)
    sharpen(arm.model)
    loss = float(arm.take(loop.train_step, batch, device)[0])
    weights, state = dict(arm.model.named_parameters()), arm.optimizer.state
    gradients = {name: _error(weights[name].grad, gradient) for name, gradient in expected.items()}
    before = {
        name: [_sample(each) for each in (weight, state[weight]["exp_avg"], state[weight]["exp_avg_sq"])]
        for name, weight in weights.items()
        if weight in state and weight.grad is not None
    }
    arm.take(loop.train_step, batch, device)
    updates = dict.fromkeys(expected, math.inf)  # of a parameter that is not trained
    for name, (old, *moments) in before.items():
        new, gradient, step = weights[name], _sample(weights[name].grad), int(state[weights[name]]["step"])
        update = adamw_update(learning_rate, adamw, step, gradient, old, *moments)
        updates[name] = _error(_sample(new) - old, update, rounding=ULP * float(old.norm()))
    return StepCheck(abs(loss / expected_loss - 1), *_largest(gradients), *_largest(updates))


@torch.no_grad()
def sharpen(model: GPT, seed: int = 0) -> None:
    """Fill `model` with uniform random weights whose attention scores have a standard deviation of SHARPNESS.

    Biases and LayerNorms also are random, because a fault in one that is 0 or 1 changes nothing.
    """
    generator, C = torch.Generator().manual_seed(seed), model.config.n_embd
    for name, parameter in model.named_parameters():
        std = STD if parameter.dim() > 1 else 5 * STD
        if name.endswith("c_proj.weight"):
            std /= math.sqrt(2 * model.config.n_layer)  # as in GPT-2's init: otherwise bfloat16's rounding doubles
        values = torch.empty(parameter.shape).uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
        if name.endswith("attn.c_attn.weight"):
            values[: 2 * C] *= math.sqrt(SHARPNESS / (C * STD**2))  # queries and keys
        parameter.copy_(values + 1 if "ln_" in name and name.endswith("weight") else values)


@lru_cache(maxsize=1)
def plain_gradients(config: GPTConfig, x: Tensor, y: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of sharp weights on x and y, int64 (B, T), and its gradients, in float32 on the host."""
    model, total = GPT(config, seed=None).to(x.device), 0.0
    sharpen(model)
    for row, targets in zip(x.split(1), y.split(1), strict=True):
        logits = model(row)[0]  # (1, T, V)
        loss = F.cross_entropy(logits[0], targets[0], reduction="sum") / y.numel()
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}


def adamw_update(
    learning_rate: float, settings: AdamW, step: int, gradient: Tensor, weight: Tensor, moment: Tensor, square: Tensor
) -> Tensor:
    """Return by how much AdamW's step number `step`, counted from 1, changes `weight`; all tensors are float64 (N,).

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2.
    """
    beta1, beta2 = settings.betas
    moment = beta1 * moment + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    direction = moment / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + settings.eps)
    return -learning_rate * (direction + settings.weight_decay * weight)


def _sample(tensor: Any) -> Tensor:
    """Return about SAMPLES entries of `tensor` on the host, copied to float64."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLES)].cpu().double()


def _error(actual: Tensor | None, expected: Tensor, rounding: float = 0.0) -> float:
    """Return the norm of the difference, less `rounding`, relative to that of `expected`; infinity without `actual`."""
    if actual is None:
        return math.inf
    return max(float((actual.cpu() - expected).norm()) - rounding, 0.0) / float(expected.norm())


def _largest(errors: Mapping[str, float]) -> tuple[float, str]:
    """Return the largest error, NaN above all, and its name."""
    name = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return errors[name], name
