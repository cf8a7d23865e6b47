"""GPT-2, written from its papers.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", and Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners". Letters in the einsums: b row of the batch, q position of a query, k
position of a key, h head, d place within a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    """Give every position mean 0 and variance 1, then a learned gain and shift for each of its values."""

    def __init__(self, width: int, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        self.gain = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        mean = x.mean(dim=-1, keepdim=True)
        centered = x - mean
        variance = centered.square().mean(dim=-1, keepdim=True)
        return centered / torch.sqrt(variance + self.epsilon) * self.gain + self.shift


class GELU(nn.Module):
    """The Gaussian error linear unit, in the approximation with tanh (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit to every value."""
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Attention(nn.Module):
    """Masked multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """Split the width into heads: b q (h d) -> b q h d."""
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix into every position the values of the positions up to it."""
        queries, keys, values = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
        scores = scores / math.sqrt(queries.shape[-1])
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(diagonal=1)
        scores = scores.masked_fill(future, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        mixture = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        return self.output(mixture.reshape(x.shape))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, for each position on its own."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.activation = GELU()
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every position."""
        return self.contract(self.activation(self.expand(x)))


class Layer(nn.Module):
    """One layer; GPT-2 moved each normalization to the input of its part."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the attention and the feed-forward network find."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT2(nn.Module):
    """The language model. The defaults are the smallest model of the paper."""

    def __init__(
        self, depth: int = 12, width: int = 768, heads: int = 12, context: int = 1024, vocabulary: int = 50257
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.final_norm = LayerNorm(width)
        self.initialize()

    def initialize(self) -> None:
        """Draw all matrices from N(0, 0.02); those that end a residual branch are scaled by their number."""
        residual = 1 / math.sqrt(2 * len(self.layers))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = residual if name.endswith(("output.weight", "contract.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of the token after each position; with targets, the loss and the logits."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens)
        x = x + self.position_embedding(positions)
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        logits = F.linear(x, self.token_embedding.weight)
        if targets is None:
            return logits
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        chosen = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return -chosen.mean(), logits
