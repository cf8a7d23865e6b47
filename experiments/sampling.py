"""How fast tokens are drawn: ours against transformers' `generate`, in turn in one process; and at growing lengths.

`PYTHONPATH=src:. python experiments/sampling.py` writes its part of docs/PERFORMANCE.md. GPT-2 124M with random
weights, float32, greedy, one text.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from experiments import pages
from gpt2_ladder.config import GPTConfig, Size
from gpt2_ladder.measuring import gains
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import hub_format
from gpt2_ladder.using import sampling
from pipeline import environment

SIZE = Size(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
PROMPT_TOKENS, NEW_TOKENS, LENGTHS = 8, 200, (50, 200, 800)
Generate = Callable[[torch.Tensor, int], torch.Tensor]
Times = dict[tuple[str, int], list[list[float]]]  # by contestant and new tokens, of every round: `timed`
OURS, OURS_EAGER, THEIRS = "ours", "ours, eager attention", "transformers"


def contestants() -> dict[str, Generate]:
    """Return by name what continues ids, int64 (B, T), by so many tokens, all on the same weights."""
    models = {attention: GPT(GPTConfig(**SIZE.model_dump(), attention=attention)) for attention in ("flash", "eager")}
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.transformer.load_state_dict(hub_format.to_hub(models["flash"]))  # lm_head is wte's

    def generate_theirs(idx: torch.Tensor, new_tokens: int) -> torch.Tensor:
        mask = torch.ones_like(idx)
        return theirs.generate(
            idx, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
        )

    return {
        OURS: lambda idx, new_tokens: sampling.generate(models["flash"], idx, new_tokens),
        OURS_EAGER: lambda idx, new_tokens: sampling.generate(models["eager"], idx, new_tokens),
        THEIRS: generate_theirs,
    }


def timed(generate: Generate, idx: torch.Tensor, new_tokens: int) -> tuple[list[float], torch.Tensor]:
    """Return the milliseconds a new token took by the clock, and of the processors, and all ids."""
    clocks = (time.perf_counter, time.process_time)
    start = [clock() for clock in clocks]
    ids = generate(idx, new_tokens)
    return [(clock() - before) * 1000 / new_tokens for clock, before in zip(clocks, start, strict=True)], ids


def main() -> None:
    """Generate in turn, check that all say the same, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="one text of each, in an order drawn anew")
    parser.add_argument("--output", default="experiments/runs/sampling.json", help="where all times go")
    machine = environment.describe()
    parser.add_argument("--threads", type=int, default=machine.threads, help="fewer where others use the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dice, arms = random.Random(1337), contestants()
    idx = torch.randint(50257, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1337))
    runs = [(name, NEW_TOKENS) for name in arms] + [(OURS, length) for length in LENGTHS if length != NEW_TOKENS]
    token_ms: Times = {run: [] for run in runs}
    for generate in arms.values():
        timed(generate, idx, 10)
    for _ in range(arguments.rounds):
        texts = {}
        for name, length in dice.sample(runs, len(runs)):
            ms, ids = timed(arms[name], idx, length)
            token_ms[name, length].append(ms)  # by the clock, of the processors
            texts[name, length] = ids[0, : PROMPT_TOKENS + min(LENGTHS)].tolist()
        if len(set(map(tuple, texts.values()))) != 1:
            raise SystemExit(f"error: the texts differ: {texts}")
        kept = [{"contestant": name, "new_tokens": length, "ms": ms} for (name, length), ms in token_ms.items()]
        Path(arguments.output).write_text(json.dumps(kept))
        print({run: [round(one) for one in ms[-1]] for run, ms in token_ms.items()}, flush=True)
    heading = f"{arguments.rounds} rounds. {machine.device_name}, threads: {arguments.threads}, torch {machine.torch}."
    pages.put(pages.PERFORMANCE, "sampling", f"{heading}\n\n{tables(token_ms)}")


def tables(token_ms: Times) -> str:
    """Return the two Markdown tables: contestants at NEW_TOKENS, and ours at every length."""
    lines = [heads(f"{NEW_TOKENS} new tokens by", "ours")]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    lines += [row(token_ms, name, NEW_TOKENS, name) for name in (OURS, OURS_EAGER, THEIRS)]
    lines += ["", heads("new tokens", str(NEW_TOKENS)), "| ---: | ---: | ---: | ---: | ---: |"]
    lines += [row(token_ms, OURS, length, str(length)) for length in LENGTHS]
    return "\n".join(lines)


def heads(first: str, base: str) -> str:
    """Return the row of titles."""
    return f"| {first} | ms a token | of the processors | ms over {base} | of the processors over {base} |"


def row(token_ms: Times, name: str, length: int, title: str) -> str:
    """Return the row of one run: its medians, and how many times ours at NEW_TOKENS they are, with the interval."""
    found, ours = (list(zip(*token_ms[one], strict=True)) for one in ((name, length), (OURS, NEW_TOKENS)))
    cells = [title, *(f"{statistics.median(ms):.1f}" for ms in found)]
    cells += ["" if ms == base else str(gains.gain(ms, base)) for ms, base in zip(found, ours, strict=True)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
