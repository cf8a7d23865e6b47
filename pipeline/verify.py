"""Compare our GPT with transformers' GPT-2, on the downloaded and on random weights. Write samples of text."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.training import data, devices, tokenizer
from gpt2_ladder.using import verification
from pipeline import BPE, CORPUS, CORPUS_SHA256, RESULTS, TRAIN_SHARD, WEIGHTS, run

PROMPT, NEW_TOKENS = "Hello, I'm a language model,", 30
SAMPLES, TOP_K = 5, 50


def main() -> None:
    params = params_yaml.load()
    memory = pretrained.needed(params.size)[1]
    devices.check_memory(torch.device("cpu"), memory, f"verifying {params.model} against transformers")
    logging.disable_progress_bar()  # transformers shows one for every checkpoint
    encoding = tokenizer.open_encoding(*BPE)
    idx = next(data.Batches(data.open_shard(TRAIN_SHARD), 1, params.size.n_positions))[0]  # (1, n_positions)
    prompt = torch.tensor([encoding.encode_ordinary(PROMPT)])

    files.check_sha256(CORPUS, CORPUS_SHA256)
    downloads.check_recorded(WEIGHTS / hub_format.CONFIG, WEIGHTS / hub_format.WEIGHTS)
    stand_in = downloads.is_stand_in(WEIGHTS / "model.safetensors")
    weights = verification.compare(WEIGHTS, idx, prompt, NEW_TOKENS)
    # in WEIGHTS, because /tmp may be smaller or in memory; the next download removes files of a killed stage
    with tempfile.TemporaryDirectory(dir=WEIGHTS, prefix=downloads.UNFINISHED) as folder:
        hub_format.save_gpt(GPT(params.size.gpt(), params.seed), Path(folder))
        random = verification.compare(Path(folder), idx, prompt, NEW_TOKENS)
    for name, comparison in (("the downloaded weights", weights), ("random weights", random)):
        print(f"{name}: {comparison}", flush=True)
        if not comparison.passed:
            raise UserError(f"our GPT and transformers differ on {name}: {comparison}; fix src/gpt2_ladder/model.py")

    lines, known_loss = [pretrained.STAND_IN_NOTICE, "No samples: random weights write random words."], None
    if not stand_in:
        model = hub_format.load_gpt(WEIGHTS, "flash")
        if params.model == "gpt2":  # llm.c reports the loss of this size only
            known_loss = verification.llmc_loss(model, CORPUS.read_text(encoding="utf-8"), encoding)
        torch.manual_seed(params.seed)
        how = {"do_sample": True, "top_k": TOP_K, "max_new_tokens": NEW_TOKENS, "num_return_sequences": SAMPLES}
        rows = hub_format.to_transformers(model).generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        lines = ["OpenAI's weights were verified.", *(f"> {encoding.decode(row)!r}" for row in rows.tolist())]
    samples = "\n".join(lines)
    print(samples, flush=True)
    files.write(RESULTS / "samples.txt", samples + "\n")
    result = {
        "weights": "stand-in" if stand_in else "openai",
        **asdict(weights),
        "random": asdict(random),
        "note": pretrained.STAND_IN_NOTICE if stand_in else None,
        "llmc_loss": known_loss,
        "llmc_loss_diff": None if known_loss is None else known_loss - verification.LLMC_LOSS,
    }
    files.write_json(RESULTS / "verify.json", result)


if __name__ == "__main__":
    run(main)
