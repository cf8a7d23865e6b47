"""Evaluate a network on HellaSwag's 10,042 questions, or on the first N: find the likeliest of four endings.

`acc` compares the log probabilities of whole endings, `acc_norm` the means over the tokens of an ending. This is not a
stage of `dvc repro`. The first call downloads 12 MB. All questions take over an hour on two cores.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch.nn.utils.rnn import pad_sequence

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import devices, tokenizer
from pipeline import BPE, RESULTS, WEIGHTS, Parser, check_weights, read_environment, run

QUESTIONS = Path("data/hellaswag_val.jsonl")
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # also in TensorFlow Datasets' checksums
GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57"
SOURCES = (f"{GITHUB}/data/{QUESTIONS.name}",)
IGNORED = -100  # F.cross_entropy skips this target


def main(*arguments: str) -> None:
    params = params_yaml.load()
    parser = Parser(prog="python -m pipeline.tools.hellaswag", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=WEIGHTS, help=f"the folder, by default {WEIGHTS}")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate only the first N questions")
    args = parser.parse_args(arguments)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be 1 or more")
    check_weights(args.model)
    environment = read_environment()
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    model = hub_format.load_gpt(args.model, "flash", GPT2_VOCAB_SIZE).to(device).eval()
    with downloads.download_lock(QUESTIONS.parent):
        downloads.fetch(QUESTIONS, SHA256, SOURCES)
    encoding = tokenizer.open_encoding(*BPE)
    examples = [json.loads(line) for line in QUESTIONS.read_bytes().splitlines()]
    origin = downloads.read_provenance(*hub_format.weight_files(args.model))
    print(f"{args.model}: {origin['note'] or origin['source']}", flush=True)
    grades, chosen, scores = [], examples[: args.limit], dict[str, Any]()
    for right in grade(model, chosen, encoding, device):
        grades.append(right)
        if len(grades) % 100 == 0 or len(grades) == len(chosen):
            line = f"hellaswag: {len(grades):,}/{len(chosen):,}"
            for name, column in zip(("acc", "acc_norm"), zip(*grades, strict=True), strict=True):
                share, bounds = accuracy(column)
                scores |= {name: share, f"{name}_interval": bounds}
                line += f"  {name} {share:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]"
            print(line, flush=True)
    about = {"model": str(args.model), **origin, "environment": environment.fingerprint, "intervals": "95 %, Wilson"}
    files.write_json(RESULTS / "hellaswag.json", {**about, "n": len(grades), "of": len(examples), **scores})


@torch.no_grad()
def log_probabilities(
    model: GPT, context: list[int], endings: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
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
    model: GPT, examples: Sequence[Mapping[str, Any]], encoding: tiktoken.Encoding, device: torch.device
) -> Iterator[tuple[bool, bool]]:
    """For each example, yield whether the right ending has the largest log probability, and the largest mean.

    An example has a context `ctx`, four `endings`, and the index `label` of the right one. The texts are not changed.
    Each ending is tokenized apart from its context, with a space before it, as build-nanogpt does (its numbers are in
    docs/usage.md). lm-evaluation-harness (0.2892, 0.3114) cleans the text, and its acc_norm divides by characters.

    Source: Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?".
    """
    for number, example in enumerate(examples, 1):
        context = encoding.encode_ordinary(example["ctx"])
        endings = [encoding.encode_ordinary(" " + ending) for ending in example["endings"]]
        longest, n_positions = len(context) + max(map(len, endings)) - 1, model.config.n_positions
        if longest > n_positions:
            raise UserError(f"example {number} takes {longest} positions; use a network with more than {n_positions}")
        sums, means = log_probabilities(model, context, endings, device)
        yield int(sums.argmax()) == example["label"], int(means.argmax()) == example["label"]


def accuracy(correct: Sequence[bool]) -> tuple[float, list[float]]:
    """Return the share of correct answers and its 95 % Wilson interval.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    interval = binomtest(sum(correct), len(correct)).proportion_ci(confidence_level=0.95, method="wilson")
    return sum(correct) / len(correct), [float(interval.low), float(interval.high)]


if __name__ == "__main__":
    run(main)
