"""Draw tokens from a network, one after the other, and turn them into text as they come.

Every token takes one pass over itself alone: keys and values of those before it are kept (the KV cache), so that time
is linear in length. Ids from GPT2_VOCAB_SIZE on, the rows that pad a vocabulary, are never drawn: they are no tokens.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator

import tiktoken
import torch
from torch import Tensor

from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.model import GPT

Choose = Callable[[Tensor], Tensor]  # logits, float32 (B, V) on the CPU -> ids, int64 (B, 1)


def greedy(logits: Tensor) -> Tensor:
    """Choose the likeliest token of every row: (B, V) -> int64 (B, 1)."""
    return logits.argmax(-1, keepdim=True)


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for every row, by its probability at `temperature`: (B, V) -> int64 (B, 1); at 0, the likeliest."""
    if temperature == 0:
        return greedy(logits)
    likely = keep_likeliest(logits / temperature, top_k, top_p)
    return torch.multinomial(likely.softmax(-1), 1, generator=generator)


def keep_likeliest(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return `logits`, (B, V), with -inf for all but the `top_k` likeliest, and then all but the nucleus of `top_p`.

    The nucleus is the fewest tokens, likeliest first, whose probabilities together reach `top_p`. The likeliest is
    always left; of logits that are equal to the last of the top k, all are.

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation"; Holtzman et al. 2019, "The Curious Case of Neural
    Text Degeneration".
    """
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        rising, order = logits.sort()  # (B, V) each
        outside = rising.softmax(-1).cumsum(-1) <= 1 - top_p  # (B, V)
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def stream(model: GPT, idx: Tensor, new_tokens: int, choose: Choose = greedy) -> Iterator[Tensor]:
    """Yield `new_tokens` times the next token of every row of `idx`, int64 (B, T), as int64 (B, 1).

    `choose` works on the CPU, so that a seed means the same on every device.

    Raises:
        UserError: the tokens together are more than the network has positions.
    """
    room, positions = idx.size(1) + new_tokens, model.config.n_positions
    if room > positions:
        raise UserError(
            f"{idx.size(1)} tokens and {new_tokens} new ones are {room}, over this network's n_positions, {positions}: "
            "ask for fewer, or shorten the prompt"
        )
    return _stream(model, idx, new_tokens, choose)


@torch.no_grad()
def _stream(model: GPT, idx: Tensor, new_tokens: int, choose: Choose) -> Iterator[Tensor]:
    size, (B, T), start = model.config, idx.shape, 0
    shape = (size.n_layer, 2, B, size.n_head, T + new_tokens, size.n_embd // size.n_head)
    cache = torch.empty(shape, device=idx.device)  # (L, 2, B, H, T + new_tokens, D); grown instead, it would be copied
    for _ in range(new_tokens):
        logits = model(idx, cache=cache, start=start)[0][:, -1, :GPT2_VOCAB_SIZE]  # (B, V)
        start += idx.size(1)
        idx = choose(logits.float().cpu()).to(idx.device)  # (B, 1)
        yield idx


def generate(model: GPT, idx: Tensor, new_tokens: int, choose: Choose = greedy) -> Tensor:
    """Return `idx`, int64 (B, T), and the `new_tokens` that `stream` has for every row: int64 (B, T + new_tokens)."""
    return torch.cat((idx, *stream(model, idx, new_tokens, choose)), dim=1)


def decode(ids: Iterable[int], encoding: tiktoken.Encoding) -> Iterator[str]:
    """Yield the text of `ids` as soon as it is whole: a token may be some bytes of a character, which waits for others.

    What never becomes a character is U+FFFD, as in `encoding.decode`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)
