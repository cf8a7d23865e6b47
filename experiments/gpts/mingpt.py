"""GPT-2 in the style of minGPT: every operation spelled out, with dropout and a head of its own."""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------


class CfgNode:
    """A bag of settings: config.name instead of config["name"]."""

    def __init__(self, **kwargs):
        self.__dict__.update(kwargs)

    def to_dict(self):
        """Return the settings as a dict."""
        return dict(self.__dict__)

    def merge_from_dict(self, d):
        """Set every key of a dict."""
        self.__dict__.update(d)


# -----------------------------------------------------------------------------


class NewGELU(nn.Module):
    """GELU by the tanh formula, which GPT-2 was trained with (https://arxiv.org/abs/1606.08415)."""

    def forward(self, x):
        """Any shape -> the same shape."""
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1.0 + torch.tanh(inner))


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention with a mask, written out (PyTorch has nn.MultiheadAttention too)."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        # ones where a token may look: at itself and to the left
        mask = torch.tril(torch.ones(config.block_size, config.block_size))
        self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size))
        self.n_head = config.n_head
        self.n_embd = config.n_embd

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.size()

        # heads become a dimension of the batch: 3 x (B, nh, T, hs)
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

        # (B, nh, T, hs) x (B, nh, hs, T) -> (B, nh, T, T)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v  # (B, nh, T, T) x (B, nh, T, hs) -> (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # heads side by side

        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    """A Transformer block: communicate, then compute."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(config.n_embd, 4 * config.n_embd),
                "c_proj": nn.Linear(4 * config.n_embd, config.n_embd),
                "act": NewGELU(),
                "dropout": nn.Dropout(config.resid_pdrop),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))  # the MLP's forward

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2."""

    @staticmethod
    def get_default_config():
        """Return GPT-2 124M; set model_type to None to give n_layer, n_head and n_embd instead."""
        C = CfgNode()
        C.model_type = "gpt2"
        C.n_layer = None
        C.n_head = None
        C.n_embd = None
        C.vocab_size = 50257
        C.block_size = 1024
        C.embd_pdrop = 0.1
        C.resid_pdrop = 0.1
        C.attn_pdrop = 0.1
        return C

    def __init__(self, config):
        super().__init__()
        sizes_given = None not in (config.n_layer, config.n_head, config.n_embd)
        assert (config.model_type is not None) != sizes_given, "give either model_type or all three sizes"
        if not sizes_given:
            sizes = {
                "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
                "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
                "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
                "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
                "gpt-mini": {"n_layer": 6, "n_head": 6, "n_embd": 192},
                "gpt-nano": {"n_layer": 3, "n_head": 3, "n_embd": 48},
            }
            config.merge_from_dict(sizes[config.model_type])
        self.block_size = config.block_size

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.embd_pdrop),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

        # draw all weights, then those of the residual projections again, as the GPT-2 paper scales them
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

        print(f"number of parameters: {sum(p.numel() for p in self.transformer.parameters()) / 1e6:.2f}M")

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """(B, T) -> logits (B, T, vocab_size), and the loss if targets are given; a target of -1 does not count."""
        t = idx.size(1)
        assert t <= self.block_size, f"{t} tokens do not fit into a block of {self.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device).unsqueeze(0)  # (1, t)

        tok_emb = self.transformer.wte(idx)  # (b, t, n_embd)
        pos_emb = self.transformer.wpe(pos)  # (1, t, n_embd)
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)

        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        """Append max_new_tokens tokens to idx (b, t), one after the other."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size :])
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                v, _ = torch.topk(logits, top_k)
                logits[logits < v[:, [-1]]] = -float("Inf")
            probs = F.softmax(logits, dim=-1)
            idx_next = torch.multinomial(probs, 1) if do_sample else probs.argmax(-1, keepdim=True)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx
