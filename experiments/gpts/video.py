"""GPT-2 124M typed along a video: the network, a loader for input.txt, and a training that starts right away."""

import inspect
import math
import time
from dataclasses import dataclass

import tiktoken
import torch
import torch.nn as nn
from hellaswag import iterate_examples, render_example
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """All heads of self-attention at once."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        # one matrix makes queries, keys and values
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = 1  # a flag for _init_weights
        self.n_head = config.n_head
        self.n_embd = config.n_embd

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.size()
        hs = C // self.n_head  # head size, 64 in GPT-2
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # flash attention
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Two layers with a GELU between them, for each token alone."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = 1

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        x = self.gelu(self.c_fc(x))
        return self.c_proj(x)


class Block(nn.Module):
    """Tokens exchange information in attn, then each of them thinks in mlp."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@dataclass
class GPTConfig:
    """The sizes of GPT-2 124M."""

    block_size: int = 1024  # longest sequence
    vocab_size: int = 50257  # 50,000 merges + 256 bytes + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class GPT(nn.Module):
    """The network, with the hub's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix for input and output
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            std = 0.02
            if hasattr(module, "NANOGPT_SCALE_INIT"):
                std *= (2 * self.config.n_layer) ** -0.5  # two additions to the residual stream per block
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        """(B, T) -> logits (B, T, vocab_size), and the loss if there are targets."""
        T = idx.size(1)
        assert idx.size(1) <= self.config.block_size, f"{T} tokens are more than block_size"
        pos = torch.arange(0, T, dtype=torch.long, device=idx.device)  # (T)
        tok_emb = self.transformer.wte(idx)  # (B, T, n_embd)
        pos_emb = self.transformer.wpe(pos)  # (T, n_embd)
        x = tok_emb + pos_emb
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate, device):
        """Return AdamW that decays matrices, but not biases and LayerNorms."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and "cuda" in device
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


# ---------------------------------------------------------------------------------------------------------------------


class DataLoaderLite:
    """Batches of B x T tokens from input.txt, over and over."""

    def __init__(self, B, T):  # noqa: N803  the video's names
        self.B, self.T = B, T
        with open("input.txt") as f:  # noqa: PTH123  as the video does
            text = f.read()
        self.tokens = torch.tensor(tiktoken.get_encoding("gpt2").encode(text))
        print(f"{len(self.tokens)} tokens, {len(self.tokens) // (B * T)} batches per epoch")
        self.position = 0

    def next_batch(self):
        """Return inputs and targets, both (B, T)."""
        B, T = self.B, self.T
        buf = self.tokens[self.position : self.position + B * T + 1]
        self.position += B * T
        if self.position + B * T + 1 > len(self.tokens):
            self.position = 0
        return buf[:-1].view(B, T), buf[1:].view(B, T)


device = "cpu"
if torch.cuda.is_available():
    device = "cuda"
elif hasattr(torch.backends, "mps") and torch.backends.mps.is_available():
    device = "mps"
print(f"device: {device}")

torch.manual_seed(1337)
if torch.cuda.is_available():
    torch.cuda.manual_seed(1337)

total_batch_size = 524288  # 2**19 tokens, about the 0.5M of the GPT-3 paper
B, T = 16, 1024
grad_accum_steps = total_batch_size // (B * T)
train_loader = DataLoaderLite(B, T)
torch.set_float32_matmul_precision("high")

model = GPT(GPTConfig(vocab_size=50304))  # a multiple of 128
model.to(device)
model = torch.compile(model)

max_lr, min_lr = 6e-4, 6e-5
warmup_steps, max_steps = 715, 19073


def get_lr(step):
    """Rise linearly, then fall along a cosine."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (max_lr - min_lr)


@torch.no_grad()
def hellaswag_accuracy(model):
    """Return the share of questions whose right ending has the lowest loss per token."""
    right = total = 0
    for example in iterate_examples("val"):
        _, tokens, mask, label = render_example(example)
        tokens, mask = tokens.to(device), mask.to(device)
        logits, _ = model(tokens)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")  # (4, T - 1)
        means = (losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        right += int(means.argmin().item() == label)
        total += 1
    return right / total


optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=max_lr, device=device)

for step in range(max_steps):
    t0 = time.time()
    if step % 250 == 249:
        print(f"hellaswag: {hellaswag_accuracy(model):.4f}")
    optimizer.zero_grad()
    loss_accum = 0.0
    for _ in range(grad_accum_steps):
        x, y = train_loader.next_batch()
        x, y = x.to(device), y.to(device)
        with torch.autocast(device_type=device, dtype=torch.bfloat16):
            logits, loss = model(x, y)
        loss = loss / grad_accum_steps
        loss_accum += loss.detach()
        loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = get_lr(step)
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    dt = time.time() - t0
    print(f"step {step:5d} | loss {loss_accum:.6f} | norm {norm:.4f} | {total_batch_size / dt:.0f} tok/s")
