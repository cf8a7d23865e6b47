"""HellaSwag, completion style: which of four endings a network finds likeliest after a context.

The text is taken as it is; an ending is tokenized apart from its context, with a blank before it. `acc` goes by the log
probability of the whole ending, `acc_norm` by its mean over the ending's tokens. So does hellaswag.py of build-nanogpt,
where OpenAI's 124M weights have acc 0.2859 and acc_norm 0.2955 on all 10,042 examples. lm-evaluation-harness has other
numbers under the same names (0.2892, 0.3114): it cleans the text, and its acc_norm divides by characters.

Source: Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tiktoken
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt2_ladder.config import UserError
from gpt2_ladder.files import printable
from gpt2_ladder.model import GPT

IGNORED = -100  # what F.cross_entropy takes for a target that does not count


class Example(BaseModel):
    """One line of hellaswag_val.jsonl, as far as it is needed: `label` is the index of the right ending."""

    model_config = ConfigDict(strict=True, frozen=True)

    ctx: Annotated[str, Field(min_length=1)]
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Annotated[int, Field(ge=0, le=3)]


def read(path: Path) -> list[Example]:
    """Return the examples in `path`, one JSON object a line.

    Raises:
        UserError: there is none, or a line is none.
    """
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            examples.append(Example.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "line"
            raise UserError(f"{path}:{number}: not a HellaSwag example: {where}: {printable(first['msg'])}") from None
    if not examples:
        raise UserError(f"{path}: there is no example in it")
    return examples


@torch.no_grad()
def log_probabilities(
    model: GPT, context: list[int], endings: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the log probability in nats of each of E `endings` after `context`, and its mean over the ending's tokens.

    All go through the network as one batch, padded on the right, where no token of theirs sees the padding.

    Returns:
        float32 (E,) twice.
    """
    idx = pad_sequence([torch.tensor((context + ending)[:-1]) for ending in endings], batch_first=True)  # (E, T)
    targets = pad_sequence(
        [torch.tensor([IGNORED] * (len(context) - 1) + ending) for ending in endings],
        batch_first=True,
        padding_value=IGNORED,
    ).to(device)  # (E, T)
    logits = model(idx.to(device))[0]  # (E, T, V)
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")  # (E, T)
    sums = -losses.sum(1)  # (E,)
    return sums, sums / (targets != IGNORED).sum(1)


def grade(
    model: GPT, examples: Sequence[Example], encoding: tiktoken.Encoding, device: torch.device
) -> Iterator[tuple[bool, bool]]:
    """Yield for each of `examples` whether its right ending is the likeliest: as a whole, and by the mean of a token.

    Raises:
        UserError: the network's context is too short for an example.
    """
    for number, example in enumerate(examples, 1):
        context = encoding.encode_ordinary(example.ctx)
        endings = [encoding.encode_ordinary(" " + ending) for ending in example.endings]
        longest, room = len(context) + max(map(len, endings)) - 1, model.config.n_positions
        if longest > room:
            raise UserError(f"example {number} takes {longest} positions; this network has n_positions {room}")
        sums, means = log_probabilities(model, context, endings, device)
        yield int(sums.argmax()) == example.label, int(means.argmax()) == example.label


def accuracy(right: Sequence[bool]) -> tuple[float, list[float]]:
    """Return the share of what is `right`, and Wilson's 95 % interval for it.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    interval = binomtest(sum(right), len(right)).proportion_ci(confidence_level=0.95, method="wilson")
    return sum(right) / len(right), [float(interval.low), float(interval.high)]
