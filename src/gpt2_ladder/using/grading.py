"""Grade a network on HellaSwag, completion style: find the likeliest of four endings of a context.

The text is used unchanged. Each ending is tokenized separately from its context, with a space before it. `acc` compares
the log probabilities of whole endings, `acc_norm` the means over the tokens of an ending. build-nanogpt's hellaswag.py
does the same: its acc of OpenAI's 124M weights is 0.2859 on all 10,042 examples, its acc_norm 0.2955. The numbers of
lm-evaluation-harness (0.2892, 0.3114) differ: it cleans the text, and its acc_norm divides by characters.

Source: Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tiktoken
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt2_ladder.config import Strict, UserError
from gpt2_ladder.model import GPT

IGNORED = -100  # F.cross_entropy skips this target


class Example(Strict, extra="ignore"):
    """One line of hellaswag_val.jsonl, without its unused keys."""

    ctx: Annotated[str, Field(min_length=1)]
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Annotated[int, Field(ge=0, le=3)]  # index of the right ending


def read(path: Path) -> list[Example]:
    """Read the examples in `path`, one JSON object per line. Its hash is pinned, so every line is an example."""
    return [Example.model_validate_json(line) for line in path.read_bytes().splitlines()]


@torch.no_grad()
def log_probabilities(
    model: GPT, context: list[int], endings: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the log probability in nats of each ending after `context`, and its mean over the tokens of the ending.

    The E endings are one batch. Padding is on the right, so no token attends to it. Both results are float32 (E,).
    """
    idx = pad_sequence([torch.tensor((context + ending)[:-1]) for ending in endings], batch_first=True)  # (E, T)
    ids = [torch.tensor([IGNORED] * (len(context) - 1) + ending) for ending in endings]
    targets = pad_sequence(ids, batch_first=True, padding_value=IGNORED).to(device)  # (E, T)
    logits = model(idx.to(device))[0]  # (E, T, V)
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")  # (E, T)
    sums = -losses.sum(1)  # (E,)
    return sums, sums / (targets != IGNORED).sum(1)


def grade(
    model: GPT, examples: Sequence[Example], encoding: tiktoken.Encoding, device: torch.device
) -> Iterator[tuple[bool, bool]]:
    """For each example, yield whether the right ending has the largest log probability, and the largest mean."""
    for number, example in enumerate(examples, 1):
        context = encoding.encode_ordinary(example.ctx)
        endings = [encoding.encode_ordinary(" " + ending) for ending in example.endings]
        longest, n_positions = len(context) + max(map(len, endings)) - 1, model.config.n_positions
        if longest > n_positions:
            raise UserError(f"example {number} takes {longest} positions; use a network with more than {n_positions}")
        sums, means = log_probabilities(model, context, endings, device)
        yield int(sums.argmax()) == example.label, int(means.argmax()) == example.label


def accuracy(correct: Sequence[bool]) -> tuple[float, list[float]]:
    """Return the share of correct answers and its 95 % Wilson interval.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    interval = binomtest(sum(correct), len(correct)).proportion_ci(confidence_level=0.95, method="wilson")
    return sum(correct) / len(correct), [float(interval.low), float(interval.high)]
