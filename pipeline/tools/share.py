"""Write the trial's network to a folder for the Hugging Face hub: `python -m pipeline.tools.share ../my-gpt2`.

The folder contains the files that transformers loads, and a model card that describes the run that trained the network.
"""

import hashlib
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpt2_ladder import files
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.reporting.facts import templates
from gpt2_ladder.running.checkpoints import copy_weights
from gpt2_ladder.running.run import describe
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import data, tokenizer
from pipeline import BPE, CORPUS, SHARDS, TRIAL, TRIAL_FACTS, VAL_SHARD, Parser, check_weights, read_settings, run
from pipeline.trial import make_job

# a commit must contain these to repeat a run
DESCRIBED = ("Makefile", "requirements.txt", "params.yaml", "dvc.yaml", "dvc.lock", "pipeline", "src")
END_OF_TEXT_ID = GPT2_VOCAB_SIZE - 1
CARD = "README.md"  # the hub shows the file of this name as the card
MOST_NAMED = 20  # of a larger number of corpus files, the card shows one hash


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.tools.share", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to create")
    parser.add_argument("model", nargs="?", type=Path, default=TRIAL, help=f"the network's folder, by default {TRIAL}")
    parser.add_argument("--trim", action="store_true", help="remove the rows that pad the vocabulary to 50304")
    args = parser.parse_args(arguments)
    target = args.folder
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder; give the path of a new folder")
    facts = read_run() if args.model.resolve() == TRIAL.resolve() else None
    check_weights(args.model)
    tokenizer.open_encoding(*BPE)  # raises UserError if a file is damaged
    model = hub_format.load_gpt(args.model, "flash", GPT2_VOCAB_SIZE)  # flash: builds no masks
    padding = model.config.vocab_size - GPT2_VOCAB_SIZE
    model = trimmed(model) if args.trim else model
    card = templates.get_template("card.md").render(
        name=target.resolve().name,
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        padding=0 if args.trim else padding,
        trimmed=args.trim and padding > 0,
        run=facts,
        source=downloads.read_provenance(*hub_format.weight_files(args.model)),
    )
    write_folder(target, model, card + "\n", *BPE)
    print(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")
    print(f"Read {target / CARD} and choose a license at its top. Then publish the folder:")
    print("hf auth login && " + shlex.join(["hf", "upload", f"OWNER/{target.resolve().name}", str(target), "."]))


def read_run() -> dict[str, Any]:
    """Return the facts of the run that trained the trial's network; raise UserError if anything changed since."""
    if not (TRIAL / hub_format.WEIGHTS).exists():
        reason = files.read_json(TRIAL_FACTS)["reason"] if TRIAL_FACTS.exists() else None
        reason = reason or "not trained, or not pulled"
        raise UserError(f"{TRIAL}: contains no network ({reason}); train it with `dvc repro trial`")
    if changes := _changes("tokenize", "trial"):
        wrong = "the card would not describe the run that trained this network, because something has changed"
        raise UserError(f"{TRIAL}: {wrong}: {changes}; run `dvc repro trial`, or restore the committed files")
    (params, environment), manifest = read_settings(), data.read_manifest(SHARDS)
    params = params.for_trial()
    shape, recipe = params.shape("speed"), params.recipe
    root, hashes = Path(params.data.path).parent, manifest["made_of"]["inputs"]
    inputs = {name.removeprefix(f"{root}/"): sha256 for name, sha256 in hashes.items()}
    if len(inputs) > MOST_NAMED:
        digest = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
        inputs = {f"{len(inputs):,} files, hash of their hashes": digest}
    result = files.read_json(TRIAL_FACTS)
    committed = files.git("status", "--porcelain", "--", *DESCRIBED) == ""
    settings = describe(make_job(params), params, environment)
    return {
        "result": result,
        "shape": shape,
        "tokens": result["steps"] * (recipe.tokens_per_step or shape.batch_size * shape.block_size),
        "settings": {key: value for key, value in settings.items() if key not in ("environment", "level")},
        "environment": environment,
        "corpus": downloads.read_provenance(CORPUS) if params.data.source == "tiny-shakespeare" else None,
        "source": params.data.source,
        "read": inputs,
        "train": [shard for shard in manifest["shards"] if shard["path"] != str(VAL_SHARD)],
        "val": files.read_json(data.sidecar_path(VAL_SHARD)),
        "commit": files.git("rev-parse", "HEAD") if committed else None,
    }


def _changes(*stages: str) -> str:
    """Return how `stages` differ from dvc.lock, as `dvc status` prints it but in one line; empty: not at all."""
    command = [sys.executable, "-m", "dvc", "status", *stages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason"])[0]
        raise UserError(f"dvc status failed, so the run that trained the network is unknown: {reason}")
    lines = [line for line in result.stdout.splitlines() if "results/seconds/" not in line]  # differ in every run
    changed = any(line.startswith("\t\t") or "changed command" in line for line in lines)  # the rest are titles
    return " ".join(" ".join(lines).split()) if changed else ""


def trimmed(model: GPT) -> GPT:
    """Return `model` without the rows that pad its vocabulary; the logits of GPT-2's 50,257 ids stay the same."""
    shorter = GPT(model.config.model_copy(update={"vocab_size": GPT2_VOCAB_SIZE}), seed=None)
    copy_weights(shorter, dict(model.named_parameters()))
    return shorter


def write_folder(folder: Path, model: GPT, card: str, vocab_bpe: Path, encoder_json: Path) -> None:
    """Write `model`, the `card` and GPT-2's tokenizer to the new `folder`, completely or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    generation: dict[str, Any] = {**ends, "pad_token_id": END_OF_TEXT_ID}  # transformers warns if it is missing
    if padding := list(range(GPT2_VOCAB_SIZE, model.config.vocab_size)):
        generation["suppress_tokens"] = padding  # these ids have no text
    tokenizer_config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.n_positions}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        complete = Path(temporary) / "complete"
        hub_format.save_gpt(model, complete)
        files.write_json(complete / hub_format.CONFIG, hub_format.describe(model) | ends | {"dtype": "float32"})
        files.write_json(complete / "generation_config.json", generation)
        files.write_json(complete / "tokenizer_config.json", tokenizer_config)
        files.write(complete / "vocab.json", encoder_json.read_bytes())
        files.write(complete / "merges.txt", vocab_bpe.read_bytes())
        files.write(complete / CARD, card)
        complete.replace(folder)  # replaces an empty folder


if __name__ == "__main__":
    run(main)
