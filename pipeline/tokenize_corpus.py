"""Write the corpus as shards of token ids. Tiny Shakespeare: 90 % for training, the rest for validation.

It is not named tokenize.py, because a script of that name would hide the standard library's module.
"""

import shutil

import tiktoken
import torch

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Data, UserError
from gpt2_ladder.sources import corpora, documents
from gpt2_ladder.training import data, tokenizer
from pipeline import BPE, CORPUS, CORPUS_SHA256, SHARDS, TRAIN_SHARD, VAL_SHARD, run


def main() -> None:
    params = params_yaml.load()
    encoding = tokenizer.open_encoding(*BPE)
    if params.data.source == "tiny-shakespeare":
        write_tiny_shakespeare(params.data, encoding)
    else:
        corpora.write(params.data, *BPE, VAL_SHARD, TRAIN_SHARD, SHARDS, torch.get_num_threads())
    shards = (TRAIN_SHARD, VAL_SHARD)
    files.forget_damaged([*shards, *map(data.sidecar_path, shards), *SHARDS.iterdir()])


def write_tiny_shakespeare(settings: Data, encoding: tiktoken.Encoding) -> None:
    files.check_sha256(CORPUS, CORPUS_SHA256)
    text = "".join(documents.read_text(CORPUS))
    middle = int(0.9 * len(text))
    for path, part in ((TRAIN_SHARD, text[:middle]), (VAL_SHARD, text[middle:])):
        pieces = documents.parts(str(CORPUS), [part])
        data.write_shard(path, [i for piece in pieces for i in encoding.encode_ordinary(piece)])
        shard = data.open_shard(path)
        if encoding.decode(shard.tolist()) != part:
            raise UserError(f"{path}: the decoded shard differs from {CORPUS}; run `dvc repro -f tokenize`")
        print(f"{path}: {len(shard):,} tokens, which decode to the same {len(part.encode()):,} bytes of text")
    shutil.rmtree(SHARDS, ignore_errors=True)  # shards of a larger corpus
    made_of = {"source": settings.source, "inputs": {str(CORPUS): files.sha256(CORPUS)}}
    corpora.write_manifest(SHARDS, made_of, [corpora.describe(path) for path in (TRAIN_SHARD, VAL_SHARD)])


if __name__ == "__main__":
    run(main)
