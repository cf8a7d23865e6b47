"""Tiny networks in the hub's format, made by transformers."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def transformers_gpt2(tied: bool = True, activation: str = "gelu_new") -> GPT2LMHeadModel:
    """Return a small GPT-2 with large weights."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 97}
    # ten times the usual size: attention is far from uniform and GELU far from linear, so that errors show
    ends = {"bos_token_id": 96, "eos_token_id": 96}
    config = GPT2Config(
        **sizes, **ends, tie_word_embeddings=tied, initializer_range=0.2, activation_function=activation
    )
    return GPT2LMHeadModel(config).eval()


def hub_tensors() -> dict[str, torch.Tensor]:
    """Return tensors in the layout of the hub's file: no prefix, no head, a mask for every layer."""
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in transformers_gpt2().state_dict().items()}
    del tensors["lm_head.weight"]
    return tensors | {f"h.{layer}.attn.bias": torch.ones(32, 32).tril().view(1, 1, 32, 32) for layer in range(2)}
