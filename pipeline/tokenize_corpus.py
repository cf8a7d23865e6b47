"""Turn the text into two shards of token ids, the first 90 % for training and the rest for validation.

Not called tokenize.py: run as a script, that name would shadow the standard library's.
"""

from gpt2_ladder import config, data
from gpt2_ladder.config import UserError
from pipeline import CORPUS, ENCODER_JSON, TRAIN_SHARD, VAL_SHARD, VOCAB_BPE, run


def main() -> None:
    config.load()
    encoding = data.open_encoding(VOCAB_BPE, ENCODER_JSON)
    text = data.read_text(CORPUS)
    for path, part in zip((TRAIN_SHARD, VAL_SHARD), data.split_text(text), strict=True):
        data.write_shard(path, encoding.encode_ordinary(part))
        shard = data.open_shard(path)
        if encoding.decode(shard.tolist()) != part:
            raise UserError(f"{path}: decoding the shard does not give the text back")
        print(f"{path}: {len(shard):,} tokens of {len(part.encode()):,} bytes, decoded back byte for byte")


if __name__ == "__main__":
    run(main)
