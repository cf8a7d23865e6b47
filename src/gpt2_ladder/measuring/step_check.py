"""Check that the steps of an arm compute what GPT-2 and AdamW define, in the process that then times the arm.

A loss curve is a blunt probe: GPT-2 starts with nearly flat attention, so its loss hardly depends on the scale of the
scores. So the network gets random weights with sharp attention and takes two real steps. The loss and all gradients of
the first are compared with those of the plain network in float32, which `verify` compares with transformers'; the
update of the second with AdamW in float64. docs/evidence.md has the faults that this finds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_ladder.config import AdamW
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, loop

# The weights and the tolerances were chosen together, from the right and the wrong runs of experiments/power.py
STD, SHARPNESS = 0.02, 2.0  # standard deviations: of the matrices, and of the attention's scores
LOSS = {"fp32": 1e-6, "tf32": 3e-4, "bf16": 3e-4, "fp16": 3e-4}  # largest relative error
GRADIENT = {"fp32": 1e-5, "tf32": 2.5e-2, "bf16": 2.5e-2, "fp16": 5e-3}  # TF32's is not measured: at most bfloat16's
UPDATE = 1e-5
SAMPLES = 10_000  # compared entries of each parameter's update
ULP = torch.finfo(torch.float32).eps  # AdamW rounds each weight twice, by up to half of this


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
        if not self.loss <= LOSS[precision]:
            return f"the loss by {self.loss:.1e} of its value"
        if not self.gradient <= GRADIENT[precision]:
            return f"the gradient of {self.gradient_of} by {self.gradient:.1e} of its norm"
        if not self.update <= UPDATE:
            return f"AdamW's update of {self.update_of} by {self.update:.1e} of its norm"
        return None


def check(arm: Arm, batch: loop.Batch, device: torch.device, learning_rate: float, adamw: AdamW) -> StepCheck:
    """Take two steps of `arm` on `batch`, a pair of int64 (B, T), from sharp weights; return their errors."""
    sharpen(arm.model)
    batch = devices.send(batch, device)
    expected_loss, expected = plain_gradients(arm.model, batch, arm.micro_batch)
    loss = float(arm.take(loop.train_step, batch, device)[0])
    weights, state = dict(arm.model.named_parameters()), arm.optimizer.state
    gradients = {name: _error(weights[name].grad, gradient) for name, gradient in expected.items()}
    before = {
        name: [_sample(each) for each in (weight, state[weight]["exp_avg"], state[weight]["exp_avg_sq"])]
        for name, weight in weights.items()
        if weight in state
    }
    arm.take(loop.train_step, batch, device)
    updates = {}
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


def plain_gradients(model: GPT, batch: loop.Batch, rows: int) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss and, on the host, its gradients in float32, by eager code and `rows` rows at a time."""
    config = model.config.model_copy(update={"attention": "eager", "chunked_loss": False})
    with torch.device("meta"):
        plain = GPT(config, seed=None)
    plain.load_state_dict(model.state_dict(), assign=True)  # the same memory, but other parameters
    if config.tie_weights:
        plain.wte.weight = plain.lm_head.weight
    plain.to(batch[0].device)
    total = 0.0
    for x, y in zip(*(ids.split(rows) for ids in batch), strict=True):
        logits = plain(x)[0]  # (rows, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / batch[1].numel()
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.cpu() for name, weight in plain.named_parameters() if weight.grad is not None}


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


def _sample(tensor: Tensor | None) -> Tensor:
    """Return about SAMPLES entries of `tensor` on the host, copied to float64."""
    assert tensor is not None
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
