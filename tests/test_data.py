"""Text to shards and back, and batches in order."""

import itertools
import json
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import GPT2Tokenizer

from gpt2_ladder import data
from gpt2_ladder.config import UserError


def write_raw(path, ids, dtype="<u2"):
    np.array(ids, dtype=dtype).tofile(path)
    return path


def test_the_encoding_is_transformers_gpt2(encoding, bpe_files):
    vocab_bpe, encoder_json = bpe_files
    theirs = GPT2Tokenizer(vocab=str(encoder_json), merges=str(vocab_bpe))
    text = "First Citizen:\n\nWe'll   see 1595; naïve café, 你好 🙂\tend "
    assert encoding.encode_ordinary(text) == theirs(text)["input_ids"]
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]
    assert encoding.n_vocab == 50257


def test_text_is_cut_nine_to_one_by_characters():
    assert data.split_text("é" * 10) == ("é" * 9, "é")


def test_an_empty_corpus_is_refused():
    with pytest.raises(UserError, match="the corpus is empty"):
        data.split_text(" \n")


def test_a_shard_is_headerless_little_endian_uint16_with_a_sidecar(tmp_path):
    path = tmp_path / "train.bin"
    data.write_shard(path, [1, 256, 50256])
    assert path.read_bytes() == b"\x01\x00\x00\x01\x50\xc4"
    assert data.open_shard(path).tolist() == [1, 256, 50256]
    sidecar = json.loads((tmp_path / "train.json").read_text())
    assert (sidecar["dtype"], sidecar["tokens"], sidecar["vocab_size"]) == ("uint16", 3, 50257)


def test_a_shard_from_elsewhere_needs_no_sidecar(tmp_path):
    assert data.open_shard(write_raw(tmp_path / "train.bin", [5, 6])).tolist() == [5, 6]


def test_a_damaged_shard_is_refused(tmp_path):
    path = tmp_path / "train.bin"
    for raw in (b"", b"\x01\x00\x02"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="not a whole number of uint16"):
            data.open_shard(path)
    with pytest.raises(UserError, match="token id 50257 is outside"):
        data.open_shard(write_raw(path, [1, 50257]))
    data.write_shard(path, [1, 2, 3])
    with pytest.raises(UserError, match="its sidecar says"):
        data.open_shard(write_raw(path, [1, 2, 4]))


def test_batches_come_in_the_order_of_the_text_and_begin_again():
    three = list(itertools.islice(data.batches(np.arange(14, dtype="<u2"), batch_size=2, block_size=3), 3))
    assert three[0][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert three[0][1].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert three[1][0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert three[2][0].tolist() == three[0][0].tolist()  # 12 and 13 do not fill a batch
    two = list(itertools.islice(data.batches(np.arange(12, dtype="<u2"), batch_size=2, block_size=3), 2))
    assert two[1][0].tolist() == two[0][0].tolist()  # 6 to 11 fill one, but the token after them is not there


def test_the_last_batch_needs_the_token_after_it():
    assert next(data.batches(np.arange(7, dtype="<u2"), 2, 3))[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(UserError, match="too short for one batch"):
        data.batches(np.arange(6, dtype="<u2"), 2, 3)


def test_validation_sees_its_tokens_once():
    shard = np.arange(30, dtype="<u2")
    inputs = torch.cat([x for x, _ in data.first_batches(shard, 24, 2, 3)])
    assert inputs.flatten().tolist() == list(range(24))
    with pytest.raises(UserError, match=r"eval_tokens \(30\)"):
        data.first_batches(shard, 30, 2, 3)


def test_joined_batches_are_the_same_rows_in_the_same_order():
    shard = np.arange(100, dtype=np.uint16)
    parts, whole = data.batches(shard, 2, 8), next(data.joined(data.batches(shard, 2, 8), 3))
    for index in range(2):
        assert torch.equal(whole[index], torch.cat([batch[index] for batch in [*islice(data.batches(shard, 2, 8), 3)]]))
    assert torch.equal(next(data.joined(parts, 1))[0], whole[0][:2])
