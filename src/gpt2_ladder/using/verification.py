"""Check that our GPT computes the same function as transformers' GPT-2, and that the weights are OpenAI's."""

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

# Correct implementations differ by rounding, which grows with the logits: by 2e-6 at logits of 3, by 7e-4 at 105.
RELATIVE_TOLERANCE = 2e-5
# Source: llm.c's test_gpt2.c, the loss of OpenAI's 124M weights on the batch that `llmc_batch` builds.
LLMC_LOSS, LLMC_TOLERANCE = 5.270007, 1e-2


@dataclass(frozen=True)
class Comparison:
    """The differences between our network, with eager and with flash attention, and transformers' network."""

    max_abs_logit_diff: float  # the largest difference between two logits
    max_abs_logit: float  # the largest logit; the tolerance is relative to it
    greedy_tokens_equal: bool  # whether both networks choose the same greedy tokens

    @property
    def passed(self) -> bool:
        """Whether the two networks compute the same function, up to float32 rounding."""
        return self.greedy_tokens_equal and self.max_abs_logit_diff <= RELATIVE_TOLERANCE * self.max_abs_logit


@torch.no_grad()
def compare(folder: Path, idx: Tensor, prompt: Tensor, new_tokens: int) -> Comparison:
    """Load the checkpoint in `folder` into our GPT and into transformers', and compare both in float32 on the CPU.

    Compare the logits for `idx`, int64 (B, T), and the first `new_tokens` greedy tokens after `prompt`, int64 (1, T).
    """
    reference = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected_logits = reference(idx).logits  # (B, T, V)
    expected_ids = reference.generate(  # ends early after <|endoftext|>
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    differences, equal = [], True
    for attention in ("eager", "flash"):
        ours = hub_format.load_gpt(folder, attention)
        differences.append((ours(idx)[0] - expected_logits).abs().max())
        # our network continues the prompt in the same way if it predicts each new token from those before it
        predicted = ours(expected_ids[:, :-1])[0].argmax(-1)  # (1, T + new_tokens - 1)
        equal = equal and torch.equal(predicted[:, prompt.size(1) - 1 :], expected_ids[:, prompt.size(1) :])
        del ours  # so that memory holds two networks, not three
    worst = torch.stack(differences).max().item()  # keeps NaN, which Python's max would drop
    return Comparison(worst, expected_logits.abs().max().item(), equal)


def llmc_batch(text: str, encoding: tiktoken.Encoding) -> tuple[Tensor, Tensor]:
    """Return llm.c's test batch from the first 257 tokens of `text`: inputs and targets, both int64 (4, 64)."""
    # <|endoftext|> comes before the text and after every blank line
    separated = END_OF_TEXT + text[:4096].replace("\n\n", "\n\n" + END_OF_TEXT)  # 4,096 characters are enough
    ids = torch.tensor(encoding.encode(separated, allowed_special={END_OF_TEXT})[: 4 * 64 + 1])
    return ids[:-1].view(4, 64), ids[1:].view(4, 64)


@torch.no_grad()
def llmc_loss(model: GPT, text: str, encoding: tiktoken.Encoding) -> float:
    """Return the loss in nats on llm.c's test batch; raise UserError if it is not that of OpenAI's weights."""
    loss = float(model(*llmc_batch(text, encoding))[1])
    if not abs(loss - LLMC_LOSS) <= LLMC_TOLERANCE:
        raise UserError(f"the loss on llm.c's batch is {loss:.6f}, expected {LLMC_LOSS}; run `dvc repro -f download`")
    return loss
