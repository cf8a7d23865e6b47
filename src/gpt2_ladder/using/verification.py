"""Whether our GPT is the same function as transformers' GPT-2, and the weights those that everybody else has."""

from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training.tokenizer import END_OF_TEXT
from gpt2_ladder.using import sampling

# Two right implementations differ by rounding, and rounding grows with the logits: 2e-6 at 3, 7e-4 at 105 were seen.
RELATIVE_TOLERANCE = 2e-5
# Source: llm.c's test_gpt2.c, the loss of OpenAI's 124M weights on the batch that `llmc_batch` builds.
LLMC_LOSS, LLMC_TOLERANCE = 5.270007, 1e-2


@dataclass(frozen=True)
class Comparison:
    """How far our network is from transformers', with eager and flash attention, whichever is worse.

    Attributes:
        max_abs_logit_diff: largest difference between two logits.
        max_abs_logit: largest logit, the measure of that difference.
        greedy_tokens_equal: whether the greedy continuations are the same, token for token.
    """

    max_abs_logit_diff: float
    max_abs_logit: float
    greedy_tokens_equal: bool

    @property
    def passed(self) -> bool:
        """Whether the two are the same function, up to rounding in float32."""
        return self.greedy_tokens_equal and self.max_abs_logit_diff <= RELATIVE_TOLERANCE * self.max_abs_logit


@torch.no_grad()
def compare(folder: Path, idx: Tensor, prompt: Tensor, new_tokens: int) -> Comparison:
    """Load the checkpoint in `folder` into our GPT and into transformers, and run both in float32 on the CPU.

    Args:
        folder: config.json and model.safetensors, as the hub has them.
        idx: ids whose logits are compared, int64 (B, T).
        prompt: ids that are continued greedily, int64 (1, T).
        new_tokens: by how many.
    """
    reference = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected_logits = reference(idx).logits  # (B, T, V)
    expected_ids = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    differences, equal = [], True
    for attention in ("eager", "flash"):
        ours = hub_format.load_gpt(folder, attention)
        differences.append((ours(idx)[0] - expected_logits).abs().max())
        # transformers stops at <|endoftext|>, ours goes on
        ids = sampling.generate(ours, prompt, new_tokens)[:, : expected_ids.size(1)]
        equal = equal and torch.equal(ids, expected_ids)
        del ours  # before the next is loaded: with the reference, two networks are in memory and not three
    worst = torch.stack(differences).max().item()  # NaN stays NaN here; Python's max would drop it
    return Comparison(worst, expected_logits.abs().max().item(), equal)


def llmc_batch(text: str, encoding: tiktoken.Encoding) -> tuple[Tensor, Tensor]:
    """Return llm.c's test batch, (x, y) of int64 (4, 64): the text's first 257 tokens, a separator before every part.

    `<|endoftext|>` stands before the text and after every blank line, and the blank lines are kept.
    """
    separated = END_OF_TEXT + text[:4096].replace("\n\n", "\n\n" + END_OF_TEXT)  # 257 tokens are far fewer characters
    ids = torch.tensor(encoding.encode(separated, allowed_special={END_OF_TEXT})[: 4 * 64 + 1])
    return ids[:-1].view(4, 64), ids[1:].view(4, 64)


@torch.no_grad()
def llmc_loss(model: GPT, text: str, encoding: tiktoken.Encoding) -> float:
    """Return the loss in nats on llm.c's test batch.

    Raises:
        UserError: it is not what OpenAI's weights give.
    """
    loss = float(model(*llmc_batch(text, encoding))[1])
    if not abs(loss - LLMC_LOSS) <= LLMC_TOLERANCE:
        raise UserError(f"verify: llm.c's batch has loss {loss:.6f}, OpenAI's weights give {LLMC_LOSS}: wrong weights")
    return loss
