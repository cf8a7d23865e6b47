"""Turn the corpus into shards of token ids: of tiny Shakespeare the first 90 % for training, the rest for validation.

Not called tokenize.py: run as a script, that name would shadow the standard library's.
"""

import shutil

import tiktoken
import torch

from gpt2_ladder import artifacts, config, corpora, data
from gpt2_ladder.config import Data, UserError
from pipeline import CORPUS, ENCODER_JSON, SHARDS, TRAIN_SHARD, VAL_SHARD, VOCAB_BPE, run


def main() -> None:
    params = config.load()
    encoding = data.open_encoding(VOCAB_BPE, ENCODER_JSON)
    if params.data.source == "tiny-shakespeare":
        write_tiny_shakespeare(params.data, encoding)
    else:
        bpe, processes = (VOCAB_BPE, ENCODER_JSON), torch.get_num_threads()
        corpora.write(params.data, *bpe, VAL_SHARD, TRAIN_SHARD, SHARDS, processes)


def write_tiny_shakespeare(settings: Data, encoding: tiktoken.Encoding) -> None:
    text = data.read_text(CORPUS)
    parts = dict(zip((TRAIN_SHARD, VAL_SHARD), data.split_text(text), strict=True))
    for path, part in parts.items():
        data.write_shard(path, encoding.encode_ordinary(part))
        shard = data.open_shard(path)
        if encoding.decode(shard.tolist()) != part:
            raise UserError(f"{path}: decoding the shard does not give the text back")
        print(f"{path}: {len(shard):,} tokens of {len(part.encode()):,} bytes, decoded back byte for byte")
    shutil.rmtree(SHARDS, ignore_errors=True)  # of a larger corpus
    made_of = {"source": settings.source, "inputs": {str(CORPUS): artifacts.file_sha256(CORPUS)}}
    corpora.write_manifest(SHARDS, made_of, [corpora.describe(path) for path in parts])


if __name__ == "__main__":
    run(main)
