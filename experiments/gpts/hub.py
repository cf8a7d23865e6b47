"""GPT-2 from the transformers library, with its attention and its blocks written out.

Parameter names and shapes are the library's, so `GPT.from_pretrained("gpt2")` works. It is for sequences without
padding: the attention mask that the library passes on is not used.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block


class Attention(GPT2Attention):
    """The library's causal self-attention, one step at a time."""

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, **unused: object
    ) -> tuple[Tensor, Tensor]:
        """Return the attention's output and its weights."""
        B, T, C = hidden_states.shape
        query, key, value = self.c_attn(hidden_states).split(C, dim=2)
        query = self.split_heads(query)
        key = self.split_heads(key)
        value = self.split_heads(value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        scores = query @ key.transpose(2, 3)
        scores = scores * self.head_dim**-0.5
        S = key.size(2)  # T, and the tokens in the cache
        future = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
        weights = F.softmax(scores, dim=-1)
        output = self.attn_dropout(weights) @ value
        output = output.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(output)), weights

    def split_heads(self, x: Tensor) -> Tensor:
        """Give each head its part of the channels: (B, T, C) -> (B, H, T, D)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)


class Block(GPT2Block):
    """The library's block with the attention of this file."""

    def __init__(self, config: GPT2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attn = Attention(config, layer_idx=layer_idx)

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, *unused: object, **unused_too: object
    ) -> Tensor:
        """Add the attention and the MLP to the residual stream."""
        x = hidden_states
        x = x + self.attn(self.ln_1(x), past_key_values)[0]
        return x + self.mlp(self.ln_2(x))


class GPT(GPT2LMHeadModel):
    """GPT-2 with a language model's head, made of the blocks above."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer.h = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        # self.post_init() would leave the residual projections unscaled: for classes outside the library it skips
        # modules without parameters of their own, such as the two kinds in which the library scales them
        self.transformer.post_init()
