"""Generate text with a network: the trial's, one from a folder or the Hugging Face hub, or a random one.

This is not a stage of `dvc repro`. Samples are drawn one after the other and printed while they grow. If you ask for
more samples, the first ones stay the same.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from gpt2_ladder import params_yaml
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.params import Params
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import devices, tokenizer
from pipeline import BPE, TRIAL, Parser, check_weights, read_environment, run

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line feed and tab; some clear the screen


class Printer(TextStreamer):
    """Print the words from transformers' `generate` once they are complete, with control characters as escapes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print `text`, without a line feed at the end of the stream: another call of `generate` may continue it."""
        print(CONTROLS.sub(lambda match: repr(match[0])[1:-1], text), end="", flush=True)


def main(*arguments: str) -> None:
    params = params_yaml.load()
    args = parse(arguments, params.seed)
    environment = read_environment()
    device = devices.open_device(environment.device, environment.threads, args.seed, params.deterministic)
    encoding = tokenizer.open_encoding(*BPE)
    model = hub_format.to_transformers(load_network(args, params)).to(device)
    prompt = encoding.encode_ordinary(args.prompt)
    idx = torch.tensor([prompt or [encoding.eot_token]], device=device)  # (1, T); GPT-2's texts follow <|endoftext|>
    if idx.size(1) >= (most := model.config.n_positions):
        raise UserError(f"--prompt: its {idx.size(1)} tokens leave none of this network's {most} positions; shorten it")
    how: dict[str, object] = {"do_sample": False}
    if args.temperature:
        how = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p or 1.0}
    how["suppress_tokens"] = list(range(GPT2_VOCAB_SIZE, model.config.vocab_size)) or None  # these ids have no text
    torch.manual_seed(args.seed)
    printer = Printer(encoding, skip_prompt=True)  # type: ignore[arg-type]  # it only calls encoding.decode
    try:
        for number in range(1, args.samples + 1):
            if args.samples > 1:
                print(f"--- {number} of {args.samples}")
            printer.on_finalized_text(encoding.decode(prompt))
            write(model, idx, args.length, printer, how)
    except KeyboardInterrupt:
        raise UserError("stopped by Ctrl-C") from None


def write(model: Any, idx: torch.Tensor, length: int, printer: TextStreamer, how: Mapping[str, object]) -> None:
    """Print `length` tokens after `idx`, int64 (1, T); `how` goes to transformers' `generate`."""
    n_positions = model.config.n_positions
    while length:
        idx = idx if idx.size(1) < n_positions else idx[:, -(n_positions // 2) :]  # full: continue from the last half
        count = min(length, n_positions - idx.size(1))
        idx = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=count, streamer=printer, **how)
        length -= count
    print()


def parse(arguments: Sequence[str], seed: int) -> argparse.Namespace:
    """Parse the command line; `seed` is the default of --seed. Raise UserError for invalid values."""
    parser = Parser(prog="python -m pipeline.tools.sample", description=__doc__)
    network = parser.add_mutually_exclusive_group()
    network.add_argument("model", nargs="?", type=Path, default=TRIAL, help=f"the network's folder, by default {TRIAL}")
    network.add_argument("--hub", metavar="ID", help="a repository on the hub, such as openai-community/gpt2")
    network.add_argument("--random", action="store_true", help="use random weights; params.yaml sets the size")
    parser.add_argument("--prompt", default="", help="beginning of each text, by default empty")
    parser.add_argument("--samples", type=int, default=1, help="number of texts, by default 1")
    parser.add_argument("--length", type=int, default=100, help="number of new tokens in each text, by default 100")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest token; by default 1")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the TOP_K likeliest tokens, by default 50")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that reach probability TOP_P")
    parser.add_argument("--seed", type=int, default=seed, help="random seed, by default the seed in params.yaml")
    args = parser.parse_args(arguments)
    for option, valid, allowed in (
        ("samples", args.samples >= 1, "1 or more"),
        ("length", args.length >= 1, "1 or more"),
        ("temperature", args.temperature == 0 or 1e-6 <= args.temperature < math.inf, "0, or 0.000001 and more"),
        ("top_k", args.top_k >= 1, "1 or more"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= args.seed < 2**63, "0 or more and below 2**63"),
    ):
        if not valid:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be {allowed}")
    return args


def load_network(args: argparse.Namespace, params: Params) -> GPT:
    """Return the network that `args` select, and print its source to stderr if the source is recorded."""
    if args.random:
        devices.check_memory(torch.device("cpu"), count_bytes(params.size.gpt()), f"model {params.model}")
        return GPT(params.size.gpt(), params.seed)
    folder = args.model
    if args.hub is not None:
        from gpt2_ladder.sources import pretrained  # not at the top: it is not needed for other networks

        folder = pretrained.fetch_repository(args.hub)
    elif folder == TRIAL and not (folder / hub_format.CONFIG).exists():
        fix = "train it with `dvc repro trial` (if the stage was skipped, results/trial/facts.json shows why)"
        raise UserError(f"{TRIAL}: contains no network; {fix}, or give a folder, --hub ID or --random")
    check_weights(folder)
    model = hub_format.load_gpt(folder, "flash", GPT2_VOCAB_SIZE)
    weights = folder / hub_format.WEIGHTS
    if downloads.provenance_path(weights).exists():
        origin = downloads.read_provenance(weights)
        print(f"{folder}: {origin['note'] or origin['source']}", file=sys.stderr)
    return model


if __name__ == "__main__":
    run(main)
