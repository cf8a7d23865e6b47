"""GPT-2 on one page.

Letters in the shape comments: B batch, T time, C channels (n_embd), H heads, D head size (C / H), V vocabulary.
Parameter names are Hugging Face's, without their `transformer.` prefix, so that published weights map one to one.
There is no dropout, because its random masks would add noise to the loss curves that we compare.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gpt2_ladder.config import GPT2_VOCAB_SIZE, GPTConfig

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}  # flash: torch's choice
CHUNKS = 4  # parts of a chunked loss; each further chunk saves less memory and adds a sum over the head's gradient


def count_bytes(config: GPTConfig, copies: int = 1) -> int:
    """Return the bytes of `copies` copies of GPT(config)'s float32 parameters, plus its masks for eager attention."""
    C, L, P = config.n_embd, config.n_layer, config.n_positions
    embeddings = (config.vocab_size * (1 if config.tie_weights else 2) + P) * C
    return 4 * copies * (embeddings + L * (12 * C * C + 13 * C) + 2 * C) + L * P * P * (config.attention == "eager")


class Linear(nn.Linear):
    """nn.Linear without its default init; GPT.initialize fills the weights."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """nn.Embedding without its default init; GPT.initialize fills the weights."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class CausalSelfAttention(nn.Module):
    """Let every token attend to itself and to earlier tokens, in H heads at once."""

    future: Tensor  # (n_positions, n_positions), True where a token would look ahead

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.attention = config.n_head, config.attention
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if self.attention == "eager":
            # on the CPU even under torch.device("meta"), so that loading weights completes a network built there
            ones = torch.ones(config.n_positions, config.n_positions, dtype=torch.bool, device="cpu")
            self.register_buffer("future", ones.triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # 3 x (B, H, T, D)
        if self.attention != "eager":
            with sdpa_kernel(KERNELS[self.attention]) if self.attention in KERNELS else nullcontext():
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D); builds no (T, T) matrix
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
            scores = scores.masked_fill(self.future[:T, :T], float("-inf"))  # (B, H, T, T)
            y = F.softmax(scores, dim=-1) @ v  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    """Transform each token independently of the others."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2 was trained with the tanh formula
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """Add attention and then an MLP to the residual stream, each with a LayerNorm at its input."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """GPT-2: token and position embeddings, n_layer blocks, a final LayerNorm and the language model's head.

    The same config and seed give the same weights on every device. If two configs differ only in
    `vocab_size`, the rows that both networks have start with the same weights.

    Args:
        config: the network's sizes and switches.
        seed: the seed of the random weights; None leaves them uninitialized, for a caller that loads weights.
    """

    def __init__(self, config: GPTConfig, seed: int | None = 1337):
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.wte.weight = self.lm_head.weight
        if seed is not None:
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw every weight from `seed` on the CPU, from the distributions that `config.init` names.

        `pytorch`: the defaults of nn.Linear and nn.Embedding. `gpt2`: N(0, 0.02) for all matrices and embeddings, zero
        biases. The projections into the residual stream are scaled by 1 / sqrt(2 n_layer), because the stream adds up
        2 n_layer of them. OpenAI's code draws wpe with a deviation of 0.01; we use 0.02, as Hugging Face does.
        """
        stream = torch.Generator().manual_seed(seed)
        padding_stream = torch.Generator().manual_seed(seed + 1)  # padded rows must not shift the other weights
        gpt2 = self.config.init == "gpt2"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj") else 0.02
            elif isinstance(module, nn.Embedding) and module.weight is not self.lm_head.weight:
                std = 0.02 if gpt2 else 1.0
            else:
                # LayerNorm keeps its ones and zeros. A tied wte is drawn as lm_head: with nn.Embedding's default,
                # N(0, 1), the loss would start at 117.
                continue
            uniform = isinstance(module, nn.Linear) and not gpt2
            rows, padded_rows = module.weight[:GPT2_VOCAB_SIZE], module.weight[GPT2_VOCAB_SIZE:]
            for weight, generator in ((rows, stream), (padded_rows, padding_stream)):
                if uniform:
                    weight.uniform_(-bound, bound, generator=generator)
                else:
                    weight.normal_(0, std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                if uniform:
                    module.bias.uniform_(-bound, bound, generator=stream)
                else:
                    module.bias.zero_()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Predict the next token at every position.

        Args:
            idx: token ids, int64 (B, T), T at most n_positions.
            targets: the ids that follow, int64 (B, T), or None.

        Returns:
            logits: (B, T, V), detached if targets are given; None if `config.chunked_loss` is on as well.
            loss: the mean cross-entropy in nats, a float32 scalar; None without targets.
        """
        positions = torch.arange(idx.size(1), device=idx.device)  # (T,)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C) + (T, C) -> (B, T, C)
        recompute = self.config.activation_checkpointing  # stores only a block's input; backward computes the rest
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)  # (B, T, C)
        x = self.ln_f(x)  # (B, T, C)
        if targets is not None and self.config.chunked_loss:
            chunks = zip(x.flatten(0, 1).chunk(CHUNKS), targets.flatten().chunk(CHUNKS), strict=True)
            # checkpoint stores no logits: backward computes each chunk's logits again, and costs one more head product
            sums = [checkpoint(self._loss_sum, *chunk, use_reentrant=False) for chunk in chunks]  # CHUNKS x scalar
            return None, torch.stack(sums).sum() / targets.numel()
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())  # (B * T, V), (B * T,) -> scalar
        return logits.detach(), loss  # otherwise backward would add a gradient of the logits, (B, T, V) zeros

    def _loss_sum(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy of N tokens: (N, C), (N,) -> scalar."""
        return F.cross_entropy(self.lm_head(x).float(), targets, reduction="sum")  # (N, V), (N,) -> scalar
