"""Make a folder for the Hugging Face hub out of the trial's network: `python -m pipeline.tools.share ../my-gpt2`.

It holds what transformers loads, and a card whose facts are those of the very run that trained the network.
"""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.running.run import describe
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import data, tokenizer
from gpt2_ladder.using import sharing
from pipeline import (
    CORPUS,
    ENCODER_JSON,
    RESULTS,
    SHARDS,
    TRIAL,
    VAL_SHARD,
    VOCAB_BPE,
    Parser,
    check_weights,
    read_environment,
    run,
)
from pipeline.trial import make_job

# what a commit must hold to repeat a run
DESCRIBED = ("Makefile", "requirements.txt", "params.yaml", "dvc.yaml", "dvc.lock", "pipeline", "src")

MOST_NAMED = 20  # files of a corpus


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.tools.share", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to put it: a folder that is not there yet")
    parser.add_argument("model", nargs="?", type=Path, default=TRIAL, help="another network, a folder as data/gpt2")
    parser.add_argument("--trim", action="store_true", help="cut the rows off that pad the vocabulary to 50304")
    asked = parser.parse_args(arguments)
    sharing.check_target(asked.folder)
    facts = read_run() if asked.model.resolve() == TRIAL.resolve() else None
    check_weights(asked.model)
    tokenizer.open_encoding(VOCAB_BPE, ENCODER_JSON)  # refuses damaged files
    model = hub_format.load_gpt(asked.model, "flash", GPT2_VOCAB_SIZE)  # flash: it builds no masks
    padding = model.config.vocab_size - GPT2_VOCAB_SIZE
    if asked.trim:
        model = sharing.trimmed(model)
    card = sharing.card(
        {
            "name": asked.folder.resolve().name,
            "config": model.config,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "padding": 0 if asked.trim else padding,
            "trimmed": asked.trim and padding > 0,
            "run": facts,
            "source": downloads.read_provenance(*hub_format.weight_files(asked.model)),
        }
    )
    sharing.write_folder(asked.folder, model, card, ENCODER_JSON, VOCAB_BPE)
    print(f"{asked.folder}: {', '.join(sorted(path.name for path in asked.folder.iterdir()))}")
    print(f"Read {asked.folder / sharing.CARD} and choose a licence in its head; then, to publish it:")
    name, folder = shlex.quote(asked.folder.resolve().name), shlex.quote(str(asked.folder))
    print(f"hf auth login && hf upload OWNER/{name} {folder} .")


def read_run() -> dict[str, Any]:
    """Return the facts of the run that trained the trial's network.

    Raises:
        UserError: there is no network, or DVC finds that settings, code, data, results or network are not those of one
            and the same run any more.
    """
    written = RESULTS / "trial" / "metrics.json"
    if not (TRIAL / hub_format.WEIGHTS).exists():
        result = files.read_json(written) if written.exists() else {}
        reason = result.get("reason") or "none has been trained, or it was not pulled"
        raise UserError(f"{TRIAL}: holds no network ({reason}); `dvc repro trial` trains one")
    if changed := _changed("tokenize", "trial"):
        raise UserError(
            f"{TRIAL}: the network and what a card would say of it are not of one run, since these have changed: "
            f"{', '.join(changed)}; run `dvc repro trial`, or get back to the committed state"
        )
    params, environment, result = params_yaml.load(), read_environment(), files.read_json(written)
    shape, recipe = params.shape("speed"), params.recipe
    manifest, shakespeare = data.read_manifest(SHARDS), params.data.source == "tiny-shakespeare"
    root, read = Path(params.data.path).parent, manifest["made_of"]["inputs"]
    # not where they lie on this machine
    inputs = {name.removeprefix(f"{root}/"): found for name, found in read.items()}
    digest = hashlib.sha256("".join(read.values()).encode())
    settings = describe(make_job(params), params, environment)
    return {
        "result": result,
        "shape": shape,
        "tokens": shape.steps * (recipe.tokens_per_step or shape.batch_size * shape.block_size),
        "settings": {key: value for key, value in settings.items() if key not in ("environment", "level")},
        "environment": environment,
        "corpus": downloads.read_provenance(CORPUS) if shakespeare and CORPUS.exists() else None,
        "source": params.data.source,
        "read": inputs
        if len(inputs) <= MOST_NAMED
        else {f"{len(inputs):,} files, of whose hashes": digest.hexdigest()},
        "train": [shard for shard in manifest["shards"] if shard["path"] != str(VAL_SHARD)],
        "val": files.read_json(data.sidecar_path(VAL_SHARD)),
        "commit": _commit(),
    }


def _changed(*stages: str) -> list[str]:
    """Return what differs from dvc.lock, by hash, in `stages`: parameters, dependencies, outputs."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        why = (result.stderr.strip().splitlines() or ["no reason"])[0]
        raise UserError(f"dvc status cannot tell of which run the network is: {why}")
    names: list[str] = []
    for stage, kinds in json.loads(result.stdout).items():
        for kind in kinds:
            changes = next(iter(kind.values())) if isinstance(kind, dict) else {f"{stage}'s command": ""}
            for name, how in changes.items():
                names += [f"{name}: {key}" for key in how] if isinstance(how, dict) else [name]
    return names


def _commit() -> str | None:
    """Return the commit that holds the code and the settings here; None where some are in none."""
    status = subprocess.run(["git", "status", "--porcelain", "--", *DESCRIBED], capture_output=True, check=False)
    if status.returncode or status.stdout:
        return None
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run(main)
