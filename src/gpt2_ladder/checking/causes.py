"""The ways in which people's networks differ from GPT-2: each changes arguments of `changed` or of `attention`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_ladder.model import GPT, CausalSelfAttention

BIASES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Cause:
    """A difference between two networks, as a sentence, and the `changed` that gives it to ours."""

    what: str
    how: dict[str, Any] = field(hash=False)
    is_variant: bool = False


def changed(
    model: GPT,
    idx: Tensor,
    act: Callable[[Tensor], Tensor] = lambda x: F.gelu(x, approximate="tanh"),
    norm: Callable[[nn.LayerNorm, Tensor], Tensor] = lambda self, x: self(x),
    place: str = "before",
    attn_residual: float = 1.0,
    mlp_residual: float = 1.0,
    final: bool = True,
    position: Callable[[Tensor], Tensor] = lambda table: table,
    scale_embedding: Callable[[int], float] = lambda c: 1.0,
    scale_logits: Callable[[int], float] = lambda c: 1.0,
    without_bias: str = "",
    **how: Any,
) -> Tensor:
    """Return the logits, (B, T, V), of `model` for idx, int64 (B, T), with another function in one place.

    `place`: of the LayerNorms, "before" attention and MLP, "after" the residual addition, "outside" the residual
    connection, or "parallel". `position` gets the table of positions. `how` goes to `attention`.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        layer: Any = block.get_submodule(name)
        return F.linear(x, layer.weight, None if name == without_bias else layer.bias)

    def mlp(x: Tensor) -> Tensor:
        return linear("mlp.c_proj", act(linear("mlp.c_fc", x)))

    x = model.wte(idx) * scale_embedding(model.config.n_embd) + position(model.wpe.weight)[: idx.size(1)]  # (B, T, C)
    block: Any
    for block in model.h:
        attend: Any = partial(attention, block.attn, linear, **how)
        first, second = partial(norm, block.ln_1), partial(norm, block.ln_2)
        if place == "after":
            x = first(x + attend(x))
            x = second(x + mlp(x))
        elif place == "outside":
            x = second((y := first(x)) + attend(y))
            x = x + mlp(x)
        elif place == "parallel":
            x = x + attend(first(x)) + mlp(second(x))
        else:
            x = attn_residual * x + attend(first(x))
            x = mlp_residual * x + mlp(second(x))
    x = norm(model.ln_f, x) if final else x
    return model.lm_head(x) * scale_logits(model.config.n_embd)


def attention(
    self: CausalSelfAttention,
    linear: Callable[[str, Tensor], Tensor],
    x: Tensor,
    scale: Callable[[int, int], float] = lambda d, c: d**-0.5,
    diagonal: int | None = 1,
    hide: float | None = -math.inf,
    axis: int = -1,
    order: Sequence[int] = (0, 1, 2),
    interleaved: bool = False,
    restored: bool = True,
    merged: bool = True,
) -> Tensor:
    """Return the attention's output, (B, T, C), for x, (B, T, C).

    `scale` gets D and C. The tokens from `diagonal` on get the score `hide`; if that is None, they get the weight 0
    after the softmax over `axis`. `order` is that of q, k and v in c_attn. `interleaved` splits C into (D, H) instead
    of (H, D), and `restored` merges it in the same order. Without `merged`, (H, T, D) is not transposed.
    """
    B, T, C = x.shape
    parts = linear("attn.c_attn", x).split(C, dim=2)  # 3 x (B, T, C)
    H = self.n_head
    heads = [part.view(B, T, C // H, H).mT if interleaved else part.view(B, T, H, C // H) for part in parts]
    q, k, v = (heads[i].transpose(1, 2) for i in order)  # 3 x (B, H, T, D)
    future = x.new_ones(T, T, dtype=torch.bool).triu(T if diagonal is None else diagonal)
    future[0, 0] = False  # a token that sees nothing would be NaN
    scores = q @ k.mT * scale(C // H, C)  # (B, H, T, T)
    weights = (scores if hide is None else scores.masked_fill(future, hide)).softmax(axis)
    y = (weights.masked_fill(future, 0.0) if hide is None else weights) @ v  # (B, H, T, D)
    y = y.transpose(1, 2) if merged else y
    return linear("attn.c_proj", (y.mT if interleaved and restored else y).reshape(B, T, C))


def _layer_norm(
    self: nn.LayerNorm, x: Tensor, eps: float = 1e-5, mean: bool = True, correction: int = 0, outside: bool = False
) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if mean else x
    var = x.pow(2).sum(-1, keepdim=True) / (x.size(-1) - correction)
    return self.weight * x / (var.sqrt() + eps if outside else (var + eps).sqrt()) + self.bias


CAUSES = [
    Cause("Your attention is not scaled: its scores are not divided by sqrt(D)", {"scale": lambda d, c: 1.0}),
    Cause("Your attention is scaled by the width: 1/sqrt(C) instead of 1/sqrt(D)", {"scale": lambda d, c: c**-0.5}),
    Cause("Your attention is scaled by 1/D instead of 1/sqrt(D)", {"scale": lambda d, c: 1 / d}),
    Cause("Your attention is scaled by sqrt(D) instead of 1/sqrt(D)", {"scale": lambda d, c: d**0.5}),
    Cause("Your attention has no causal mask: every token sees the future", {"diagonal": None}),
    Cause("Your causal mask is off by one: every token sees the next one", {"diagonal": 2}),
    Cause("Your causal mask is off by one: a token does not see itself", {"diagonal": 0}),
    Cause("Your causal mask comes after the softmax, so the weights do not sum to 1", {"hide": None}),
    Cause("Your causal mask sets scores to 0 instead of -inf, so every token sees the future", {"hide": 0.0}),
    Cause("Your softmax is over the queries instead of the keys", {"axis": -2}),
    Cause("Your softmax is over the heads instead of the keys", {"axis": 1, "hide": -1e9}),
    Cause("Your softmax is over the rows of the batch instead of the keys", {"axis": 0, "hide": -1e9}),
    Cause("Your heads are in the wrong order: merged without the transposition back to (T, H, D)", {"merged": False}),
    Cause("Your heads are in the wrong order: split as (D, H) instead of (H, D)", {"interleaved": True}),
    Cause("Your heads are split as (D, H), but merged as (H, D)", {"interleaved": True, "restored": False}),
    *(
        Cause(f"Your c_attn has the order {''.join(names)}, not qkv", {"order": [names.index(each) for each in "qkv"]})
        for names in [*permutations("qkv")][1:]
    ),
    Cause("its GELU is exact instead of tanh (nanoGPT's choice)", {"act": F.gelu}, is_variant=True),
    Cause("Your MLP uses ReLU instead of GELU", {"act": F.relu}),
    Cause("Your MLP uses SiLU instead of GELU", {"act": F.silu}),
    Cause("Your MLP uses GELU's sigmoid formula instead of tanh", {"act": lambda x: x * torch.sigmoid(1.702 * x)}),
    Cause("Your MLP has no activation function", {"act": lambda x: x}),
    Cause("Your LayerNorms come after the residual addition, as in GPT-1", {"place": "after"}),
    Cause("Your residual connections start behind the LayerNorms", {"place": "outside"}),
    Cause("Your attention and MLP act in parallel, as in GPT-J", {"place": "parallel"}),
    Cause("Your attention has no residual connection", {"attn_residual": 0.0}),
    Cause("Your MLP has no residual connection", {"mlp_residual": 0.0}),
    *(
        Cause(f"Your LayerNorm's eps is {name} instead of 1e-05", {"norm": partial(_layer_norm, eps=eps)})
        for name, eps in (("1e-12 to 1e-08", 1e-12), ("1e-06", 1e-6), ("0.001", 1e-3))
    ),
    Cause("Your LayerNorm does not subtract the mean", {"norm": partial(_layer_norm, mean=False)}),
    Cause(
        "Your LayerNorm adds eps to the deviation of a sample",
        {"norm": partial(_layer_norm, correction=1, outside=True)},
    ),
    Cause(
        "Your LayerNorm uses the variance of a sample, divided by C - 1", {"norm": partial(_layer_norm, correction=1)}
    ),
    Cause("Your final LayerNorm is not applied", {"final": False}),
    Cause("Your network does not add the position embeddings", {"position": lambda table: 0 * table}),
    Cause("Your positions are off by one: they start at 1", {"position": lambda table: table[1:]}),
    Cause("Your token embeddings are multiplied by sqrt(C)", {"scale_embedding": lambda c: c**0.5}),
    Cause("Your logits are divided by sqrt(C)", {"scale_logits": lambda c: c**-0.5}),
    *(Cause(f"Your {name} does not add its bias", {"without_bias": name}) for name in BIASES),
]
