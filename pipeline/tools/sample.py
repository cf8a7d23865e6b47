"""Let a network write: the trial's, one from a folder or from the Hugging Face hub, or a random one.

No stage of `dvc repro`. Samples come one after the other, not as a batch: each is read while it grows, the memory is
that of one, and the first ones stay the same however many are asked for.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from gpt2_ladder import params_yaml
from gpt2_ladder.config import GPT2_VOCAB_SIZE, Params, UserError
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import devices, tokenizer
from gpt2_ladder.using import sampling
from pipeline import ENCODER_JSON, TRIAL, VOCAB_BPE, Parser, check_weights, read_environment, run

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal obeys; line feeds and tabs may do so


def main(*arguments: str) -> None:
    params = params_yaml.load()
    asked = parse(arguments, params.seed)
    environment = read_environment()
    device = devices.open_device(environment.device, environment.threads, asked.seed, params.deterministic)
    encoding = tokenizer.open_encoding(VOCAB_BPE, ENCODER_JSON)
    model = open_network(asked, params).to(device).eval()
    prompt = encoding.encode_ordinary(asked.prompt)
    idx = torch.tensor([prompt or [encoding.eot_token]], device=device)  # (1, T); GPT-2's texts follow <|endoftext|>
    generator = torch.Generator().manual_seed(asked.seed)
    choose = partial(
        sampling.draw, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, generator=generator
    )
    try:
        for number in range(1, asked.samples + 1):
            drawn = map(int, sampling.stream(model, idx, asked.length, choose))
            if asked.samples > 1:
                print(f"--- {number} of {asked.samples}")
            for text in sampling.decode(chain(prompt, drawn), encoding):
                print(CONTROLS.sub(lambda found: repr(found[0])[1:-1], text), end="", flush=True)
            print()
    except KeyboardInterrupt:
        raise UserError("stopped by Ctrl-C") from None


def parse(arguments: Sequence[str], seed: int) -> argparse.Namespace:
    """Return what was asked for; `seed` unless another one was.

    Raises:
        UserError: an option is unknown, or its value is none that it can have.
    """
    parser = Parser(prog="python -m pipeline.tools.sample", description=__doc__)
    network = parser.add_mutually_exclusive_group()
    network.add_argument("model", nargs="?", type=Path, default=TRIAL, help=f"a folder, by default {TRIAL}")
    network.add_argument("--hub", metavar="ID", help="a repository of the hub, as openai-community/gpt2")
    network.add_argument("--random", action="store_true", help="random weights, in the size that params.yaml names")
    parser.add_argument("--prompt", default="", help="what the text begins with; by default <|endoftext|>, unseen")
    parser.add_argument("--samples", type=int, default=1, help="how many texts, by default 1")
    parser.add_argument("--length", type=int, default=100, help="of each, in new tokens, by default 100")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token; by default 1")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many tokens, by default 50")
    parser.add_argument(
        "--top-p", type=float, help="draw among the likeliest that reach this probability, by default all"
    )
    parser.add_argument("--seed", type=int, default=seed, help="by default that of params.yaml")
    asked = parser.parse_args(arguments)
    for option, right, allowed in (
        ("samples", asked.samples >= 1, "1 or more"),
        ("length", asked.length >= 1, "1 or more"),
        ("temperature", asked.temperature == 0 or 1e-6 <= asked.temperature < math.inf, "0, or 0.000001 and more"),
        ("top_k", asked.top_k >= 1, "1 or more"),
        ("top_p", asked.top_p is None or 0 < asked.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= asked.seed < 2**63, "0 or more and below 2**63"),
    ):
        if not right:
            raise UserError(f"--{option.replace('_', '-')} {getattr(asked, option)}: must be {allowed}")
    return asked


def open_network(asked: argparse.Namespace, params: Params) -> GPT:
    """Return the network that was asked for, and say on stderr where it is from, if more is known than its name.

    Raises:
        UserError: it cannot be had, or its vocabulary is not GPT-2's.
    """
    if asked.random:
        devices.check_memory(torch.device("cpu"), count_bytes(params.size.gpt()), f"model {params.model}")
        return GPT(params.size.gpt(), params.seed)
    folder = asked.model
    if asked.hub is not None:
        from gpt2_ladder.sources import pretrained  # only here: it waits 4 s for transformers

        folder = pretrained.fetch_repository(asked.hub)
    elif folder == TRIAL and not (folder / hub_format.CONFIG).exists():
        raise UserError(
            f"{TRIAL}: no network is there: `dvc repro trial` trains it, or results/trial/metrics.json says why it was "
            "skipped; or name a folder, --hub ID or --random"
        )
    check_weights(folder)
    model = hub_format.load_gpt(folder, "flash", GPT2_VOCAB_SIZE)
    weights = folder / hub_format.WEIGHTS
    if downloads.provenance_path(weights).exists():
        origin = downloads.read_provenance(weights)
        print(f"{folder}: {origin['note'] or origin['source']}", file=sys.stderr)
    return model


if __name__ == "__main__":
    run(main)
