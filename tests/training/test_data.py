"""Shards are written, checked and read, and batches come in a known order."""

import hashlib
import json
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_ladder.config import UserError
from gpt2_ladder.training import data


def write_raw(path, ids):
    np.array(ids, dtype="<u2").tofile(path)
    return path


def test_a_shard_is_headerless_little_endian_uint16_with_a_sidecar(tmp_path):
    path = tmp_path / "train.bin"
    data.write_shard(path, [1, 256, 50256])
    assert path.read_bytes() == b"\x01\x00\x00\x01\x50\xc4"
    assert data.open_shard(path).tolist() == [1, 256, 50256]
    sidecar = json.loads((tmp_path / "train.json").read_text())
    assert (sidecar["dtype"], sidecar["tokens"], sidecar["vocab_size"]) == ("uint16", 3, 50257)
    # a shard from another project has none
    assert data.open_shard(write_raw(tmp_path / "other.bin", [5, 6])).tolist() == [5, 6]


def test_a_damaged_shard_is_refused(tmp_path):
    path = tmp_path / "train.bin"
    for raw in (b"", b"\x01\x00\x02"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="not a whole number of uint16"):
            data.open_shard(path)
    with pytest.raises(UserError, match="token id 50257 must be below 50257"):
        data.open_shard(write_raw(path, [1, 50257]))
    data.write_shard(path, [1, 2, 3])
    with pytest.raises(UserError, match=r"sha256 is [0-9a-f]{64}, but its sidecar has"):
        data.open_shard(write_raw(path, [1, 2, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 4}, "tokens is 3, but its sidecar has 4"),
        ({"tokens": "3"}, "tokens is 3, but its sidecar has '3'"),
        ({"dtype": "uint32"}, "dtype is uint16, but its sidecar has 'uint32'"),
        ({"vocab_size": [0] * 10**5}, r"vocab_size is 50257, but its sidecar has \[0, 0, 0"),
        ({"sha256": None}, "but its sidecar has None"),
    ],
)
def test_a_sidecar_that_describes_another_shard_is_refused_in_a_short_line(tmp_path, change, message):
    data.write_shard(tmp_path / "train.bin", [1, 2, 3])
    sidecar = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(sidecar | change))
    with pytest.raises(UserError, match=message) as caught:
        data.open_shard(tmp_path / "train.bin")
    assert len(str(caught.value)) < 500


def test_a_shard_whose_writing_stopped_between_its_two_files_is_refused(tmp_path, monkeypatch):
    path, replaced, replace = tmp_path / "train.bin", [], Path.replace
    data.write_shard(path, [1, 2, 3])
    monkeypatch.setattr(Path, "replace", lambda old, new: replaced.append(new) or replaced[1:] or replace(old, new))
    data.write_shard(path, [4, 5])  # only the first of the two files is put in place
    assert len(replaced) == 2
    with pytest.raises(UserError, match="but its sidecar has"):
        data.open_shard(path)


def test_batches_follow_the_text_and_start_again_at_its_end():
    first, second, third = islice(data.Batches(np.arange(14, dtype="<u2"), batch_size=2, block_size=3), 3)
    assert first[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert second[0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert third[0].tolist() == first[0].tolist()  # 12 and 13 do not fill a batch
    first, second = islice(data.Batches(np.arange(12, dtype="<u2"), batch_size=2, block_size=3), 2)
    assert second[0].tolist() == first[0].tolist()  # 6 to 11 fill a batch, but the target after 11 is missing


def test_a_shard_must_have_one_batch_and_the_token_after_it():
    assert next(data.Batches(np.arange(7, dtype="<u2"), 2, 3))[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(UserError, match="tokens is too short: a batch needs"):
        data.Batches(np.arange(6, dtype="<u2"), 2, 3)


def test_several_shards_are_read_as_one_text(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 50).astype("<u2")
    parts = [ids[:20], ids[20:21], ids[21:]]
    names = ["train.bin", "shards/000001.bin", "shards/000002.bin"]
    for name, part in zip(names, parts, strict=True):
        data.write_shard(tmp_path / name, part)
    manifest = {"shards": [{"path": f"data/{name}"} for name in ("val.bin", *names)]}
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "shards/stray.bin").write_bytes(b"x")  # not in the manifest
    shards = data.open_shards(tmp_path / "train.bin", tmp_path / "shards")
    assert len(shards) == 50
    for start, stop in combinations(range(52), 2):
        assert shards[start:stop].tolist() == ids[start:stop].tolist()
    hashes = "".join(hashlib.sha256(part.tobytes()).hexdigest() for part in parts)
    assert shards.sha256 == hashlib.sha256(hashes.encode()).hexdigest()
    for batch, expected in zip(islice(data.Batches(shards, 2, 3), 20), data.Batches(ids, 2, 3), strict=False):
        assert all(map(torch.equal, batch, expected))
    (tmp_path / "shards/000002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="000002"):
        data.open_shards(tmp_path / "train.bin", tmp_path / "shards")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 5}', '{"shards": [{"path": 5}]}', '{"shards": [5]}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    data.write_shard(tmp_path / "train.bin", [1, 2, 3])
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of shards; run `dvc repro -f tokenize`"):
        data.open_shards(tmp_path / "train.bin", tmp_path)


def test_shuffled_batches_have_the_same_rows_in_another_order_in_every_epoch():
    shard = np.arange(8 * 5 + 1, dtype="<u2")  # 8 rows of 5 tokens

    def epochs(count: int, seed: int | None) -> list[list[list[int]]]:
        batches = data.Batches(shard, 2, 5, seed)
        return [[row for x, _ in islice(batches, 4) for row in x.tolist()] for _ in range(count)]

    shuffled, (in_order,) = epochs(3, seed=1), epochs(1, seed=None)
    assert all(sorted(epoch) == in_order for epoch in shuffled)
    assert len({str(epoch) for epoch in [*shuffled, in_order]}) == 4
    assert epochs(3, seed=1) == shuffled
    assert epochs(3, seed=2) != shuffled
    x, y = next(data.Batches(shard, 2, 5, seed=1))
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 13])
def test_batches_resume_from_a_saved_position(seed, taken):
    shard = np.random.default_rng(0).integers(0, 50257, 42).astype("<u2")
    batches, resumed = data.Batches(shard, 2, 4, seed), data.Batches(shard, 2, 4, seed)
    for _ in range(taken):
        next(batches)
    resumed.position = batches.position
    for _ in range(12):
        assert all(map(torch.equal, next(resumed), next(batches)))


def test_validation_sees_each_of_its_tokens_once():
    shard = np.arange(30, dtype="<u2")
    inputs = torch.cat([x for x, _ in data.first_batches(shard, 24, 2, 3)])
    assert inputs.flatten().tolist() == list(range(24))
    with pytest.raises(UserError, match="eval_tokens = 30"):
        data.first_batches(shard, 30, 2, 3)


def test_concatenated_batches_keep_their_rows_in_order():
    shard = np.arange(100, dtype="<u2")
    batches = [*islice(data.Batches(shard, 2, 8), 3)]
    for count in (1, 3):
        x, y = next(data.concatenate(data.Batches(shard, 2, 8), count))
        assert torch.equal(x, torch.cat([x for x, _ in batches[:count]]))
        assert torch.equal(y, torch.cat([y for _, y in batches[:count]]))
