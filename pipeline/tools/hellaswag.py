"""Evaluate a network on HellaSwag's 10,042 questions, or on the first N questions.

This is not a stage of `dvc repro`. The first call downloads 12 MB. All questions take over an hour on two cores.
"""

from pathlib import Path

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.sources.downloads import Url
from gpt2_ladder.training import devices, tokenizer
from gpt2_ladder.using import grading
from pipeline import BPE, RESULTS, WEIGHTS, Parser, check_weights, read_environment, run

QUESTIONS = Path("data/hellaswag_val.jsonl")
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # also in TensorFlow Datasets' checksums
GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag"
REVISIONS = ("a29ff8e9a04bba4bd6588223785ce105328adc57", "master")
SOURCES = tuple(Url(f"{GITHUB}/{revision}/data/{QUESTIONS.name}") for revision in REVISIONS)


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
    examples = grading.read(QUESTIONS)
    origin = downloads.read_provenance(*hub_format.weight_files(args.model))
    print(f"{args.model}: {origin['note'] or origin['source']}", flush=True)
    grades, chosen = [], examples[: args.limit]
    for grade in grading.grade(model, chosen, encoding, device):
        grades.append(grade)
        if len(grades) % 100 == 0 or len(grades) == len(chosen):
            (acc, bounds), (acc_norm, norm_bounds) = (grading.accuracy(column) for column in zip(*grades, strict=True))
            print(
                f"hellaswag: {len(grades):,}/{len(chosen):,}  acc {acc:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]  "
                f"acc_norm {acc_norm:.4f} [{norm_bounds[0]:.4f}, {norm_bounds[1]:.4f}]",
                flush=True,
            )
    files.write_json(
        RESULTS / "hellaswag.json",
        {
            "model": str(args.model),
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


if __name__ == "__main__":
    run(main)
