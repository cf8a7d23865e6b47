"""The ways in which people's networks differ from GPT-2, as other texts at a few places of model.py."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from gpt2_ladder import model
from gpt2_ladder.model import GPT

PLACES = {  # of model.py, with eager attention
    "order": "q, k, v = self.c_attn",
    "heads": "t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)",
    "scale": "/ math.sqrt(q.size(-1))",
    "mask": 'scores.masked_fill(self.future[:T, :T], float("-inf"))',
    "future": "self.future[:T, :T]",
    "hidden": 'float("-inf")',
    "softmax": "dim=-1)",
    "merge": "y.transpose(1, 2)",
    "act": 'F.gelu(self.c_fc(x), approximate="tanh")',
    "norm": "nn.LayerNorm(config.n_embd)",
    "attention": "x + self.attn(self.ln_1(x))",
    "mlp": "x + self.mlp(self.ln_2(x))",
    "final": "self.ln_f(x)",
    "tokens": "self.wte(idx)",
    "positions": "self.wpe(positions)",
    "logits": "logits = self.lm_head(x)",
    "attn.c_attn": "self.c_attn(x)",
    "attn.c_proj": "self.c_proj(y.transpose(1, 2).reshape(B, T, C))",
    "mlp.c_fc": "self.c_fc(x)",
    "mlp.c_proj": "self.c_proj(x)",
}


@dataclass(frozen=True)
class Cause:
    """A difference between two networks, as a sentence, and the texts at PLACES that give it to ours."""

    what: str
    how: dict[str, str] = field(hash=False)
    is_variant: bool = False


class Norm(nn.LayerNorm):
    """A LayerNorm with another formula."""

    def __init__(self, width: int, formula: Callable[[Tensor], Tensor]):
        super().__init__(width)
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.formula(x) * self.weight + self.bias


def changed(ours: GPT, idx: Tensor, **how: str) -> Tensor:
    """Return the logits, (B, T, V), of `ours` for idx, int64 (B, T), with the texts `how` at PLACES of model.py."""
    source, names = inspect.getsource(model), dict[str, Any](Norm=Norm)
    for place, text in how.items():
        assert PLACES[place] in source, place
        source = source.replace(PLACES[place], text)
    exec(source, names)
    network = names["GPT"](ours.config, seed=None)
    network.load_state_dict(ours.state_dict(keep_vars=True), assign=True)  # the same parameters, for their gradients
    return network(idx)[0]


MASKED = "dim=-1).masked_fill(self.future[:T, :T], 0.0)"
BY_SIZE = "t.view(B, T, C // self.n_head, self.n_head).permute(0, 3, 1, 2)"
CENTERED = "Norm(config.n_embd, lambda x: (x - x.mean(-1, keepdim=True)) / "
DIFFERENCES = {
    "Your attention is not scaled: its scores are not divided by sqrt(D)": {"scale": ""},
    "Your attention is scaled by the width: 1/sqrt(C) instead of 1/sqrt(D)": {"scale": "/ math.sqrt(C)"},
    "Your attention is scaled by 1/D instead of 1/sqrt(D)": {"scale": "/ q.size(-1)"},
    "Your attention is scaled by sqrt(D) instead of 1/sqrt(D)": {"scale": "* math.sqrt(q.size(-1))"},
    "Your attention has no causal mask: every token sees the future": {"mask": "scores"},
    "Your causal mask is off by one: every token sees the next one": {"future": "self.future[:T, :T].triu(2)"},
    "Your causal mask is off by one: a token does not see itself": {  # but the first, or it would see nothing
        "future": "self.future[:T, :T] | torch.diag(torch.arange(T) > 0)"
    },
    "Your causal mask comes after the softmax, so the weights do not sum to 1": {"mask": "scores", "softmax": MASKED},
    "Your causal mask sets scores to 0 instead of -inf, so every token sees the future": {"hidden": "0.0"},
    "Your softmax is over the queries instead of the keys": {"softmax": "dim=-2)"},
    "Your softmax is over the heads instead of the keys": {"hidden": "-1e9", "softmax": "dim=1)"},
    "Your softmax is over the rows of the batch instead of the keys": {"hidden": "-1e9", "softmax": "dim=0)"},
    "Your heads are in the wrong order: merged without the transposition back to (T, H, D)": {"merge": "y"},
    "Your heads are in the wrong order: split as (D, H) instead of (H, D)": {
        "heads": BY_SIZE,
        "merge": "y.permute(0, 2, 3, 1)",
    },
    "Your heads are split as (D, H), but merged as (H, D)": {"heads": BY_SIZE},
    **{
        f"Your c_attn has the order {q}{k}{v}, not qkv": {"order": f"{q}, {k}, {v} = self.c_attn"}
        for q, k, v in [*permutations("qkv")][1:]
    },
    "Your MLP uses ReLU instead of GELU": {"act": "F.relu(self.c_fc(x))"},
    "Your MLP uses SiLU instead of GELU": {"act": "F.silu(self.c_fc(x))"},
    "Your MLP uses GELU's sigmoid formula instead of tanh": {"act": "(h := self.c_fc(x)) * torch.sigmoid(1.702 * h)"},
    "Your MLP has no activation function": {"act": "self.c_fc(x)"},
    "Your LayerNorms come after the residual addition, as in GPT-1": {
        "attention": "self.ln_1(x + self.attn(x))",
        "mlp": "self.ln_2(x + self.mlp(x))",
    },
    "Your residual connections start behind the LayerNorms": {
        "attention": "self.ln_2((y := self.ln_1(x)) + self.attn(y))",
        "mlp": "x + self.mlp(x)",
    },
    "Your attention and MLP act in parallel, as in GPT-J": {
        "attention": "x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))",
        "mlp": "x",
    },
    "Your attention has no residual connection": {"attention": "self.attn(self.ln_1(x))"},
    "Your MLP has no residual connection": {"mlp": "self.mlp(self.ln_2(x))"},
    **{
        f"Your LayerNorm's eps is {name} instead of 1e-05": {"norm": f"nn.LayerNorm(config.n_embd, eps={eps})"}
        for name, eps in (("1e-12 to 1e-08", 1e-12), ("1e-06", 1e-6), ("0.001", 1e-3))
    },
    "Your LayerNorm does not subtract the mean": {
        "norm": "Norm(config.n_embd, lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5))"
    },
    "Your LayerNorm adds eps to the deviation of a sample": {"norm": f"{CENTERED}(x.std(-1, keepdim=True) + 1e-5))"},
    "Your LayerNorm uses the variance of a sample, divided by C - 1": {
        "norm": f"{CENTERED}(x.var(-1, keepdim=True) + 1e-5).sqrt())"
    },
    "Your final LayerNorm is not applied": {"final": "x"},
    "Your network does not add the position embeddings": {"positions": "0 * self.wpe(positions)"},
    "Your positions are off by one: they start at 1": {"positions": "self.wpe.weight.roll(-1, 0)[positions]"},
    "Your token embeddings are multiplied by sqrt(C)": {"tokens": "self.wte(idx) * math.sqrt(self.config.n_embd)"},
    "Your logits are divided by sqrt(C)": {"logits": "logits = self.lm_head(x) / math.sqrt(self.config.n_embd)"},
    **{
        f"Your {name} does not add its bias": {name: f"({PLACES[name]} - self.{name.split('.')[1]}.bias)"}
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
}
EXACT_GELU = Cause("its GELU is exact instead of tanh (nanoGPT's choice)", {"act": "F.gelu(self.c_fc(x))"}, True)
CAUSES = [EXACT_GELU, *(Cause(what, how) for what, how in DIFFERENCES.items())]
