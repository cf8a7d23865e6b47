"""Ask a network the 10,042 questions of HellaSwag, or the first of them, and count the right endings it finds.

No stage of `dvc repro`: 12 MB come from GitHub at the first call, and all questions take over an hour on two cores.
"""

import sys
from pathlib import Path

from gpt2_ladder import artifacts, config, data, devices, files, hellaswag, hub
from gpt2_ladder.artifacts import Url
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from pipeline import ENCODER_JSON, RESULTS, VOCAB_BPE, WEIGHTS, Parser, read_environment, run, write_json

QUESTIONS = Path("data/hellaswag_val.jsonl")
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # also in TensorFlow Datasets' checksums
GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag"
SOURCES = tuple(
    Url(f"{GITHUB}/{revision}/data/{QUESTIONS.name}")
    for revision in ("a29ff8e9a04bba4bd6588223785ce105328adc57", "master")
)
FOUND = RESULTS / "hellaswag.json"


def main(*arguments: str) -> None:
    params = config.load()
    parser = Parser(prog="python -m pipeline.hellaswag", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=WEIGHTS, help="a folder, as data/gpt2 or models/trial")
    parser.add_argument("--limit", type=int, help="ask so many only, the first of the file")
    asked = parser.parse_args(arguments)
    if asked.limit is not None and asked.limit < 1:
        raise UserError(f"--limit {asked.limit}: at least one question must be asked")
    environment = read_environment()
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    model = hub.load_gpt(asked.model, "flash").to(device).eval()
    if model.config.vocab_size < GPT2_VOCAB_SIZE:
        raise UserError(f"{asked.model}: vocab_size {model.config.vocab_size} is below GPT-2's {GPT2_VOCAB_SIZE}")
    with artifacts.alone(QUESTIONS.parent):
        artifacts.fetch(QUESTIONS, SHA256, SOURCES)
    encoding = data.open_encoding(VOCAB_BPE, ENCODER_JSON)
    examples = hellaswag.read(QUESTIONS)
    origin = provenance(asked.model / hub.WEIGHTS)
    print(f"{asked.model}: {origin['note'] or origin['source']}", flush=True)
    grades = []
    chosen = examples[: asked.limit]
    for right in hellaswag.grade(model, chosen, encoding, device):
        grades.append(right)
        if len(grades) % 100 == 0 or len(grades) == len(chosen):
            (acc, bounds), (acc_norm, norm_bounds) = (hellaswag.accuracy(one) for one in zip(*grades, strict=True))
            print(
                f"hellaswag: {len(grades):,}/{len(chosen):,}  acc {acc:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]  "
                f"acc_norm {acc_norm:.4f} [{norm_bounds[0]:.4f}, {norm_bounds[1]:.4f}]",
                flush=True,
            )
    write_json(
        FOUND,
        {
            "model": str(asked.model),
            **origin,
            "environment": environment.fingerprint,
            "n": len(grades),
            "of": len(examples),
            "acc": acc,
            "acc_interval": bounds,
            "acc_norm": acc_norm,
            "acc_norm_interval": norm_bounds,
            "intervals": "95 %, Wilson",
        },
    )


def provenance(found: Path) -> dict[str, str | None]:
    """Return source, hash and note of the file `found`, from what lies beside it if that speaks of it."""
    path, sha256 = artifacts.provenance_path(found), artifacts.file_sha256(found)
    written = files.read_json(path) if path.exists() else {}
    if written.get("sha256") != sha256:
        written = {"source": "a local file; nothing beside it says where it comes from"}
    return {"source": written.get("source"), "sha256": sha256, "note": written.get("note")}


if __name__ == "__main__":
    run(main, *sys.argv[1:])
