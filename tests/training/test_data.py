"""Tokens to shards, and batches in order."""

import hashlib
import json
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_ladder.config import UserError
from gpt2_ladder.training import data


def write_raw(path, ids, dtype="<u2"):
    np.array(ids, dtype=dtype).tofile(path)
    return path


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
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{64}, its sidecar says"):
        data.open_shard(write_raw(path, [1, 2, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(tokens=4), "tokens 3, its sidecar says 4"),
        (lambda s: s.update(tokens="3"), "tokens 3, its sidecar says '3'"),
        (lambda s: s.update(dtype="uint32"), "dtype uint16, its sidecar says 'uint32'"),
        (lambda s: s.update(vocab_size=[0] * 10**5), r"vocab_size 50257, its sidecar says \[0, 0, 0"),
        (lambda s: s.pop("sha256"), "its sidecar says None"),
    ],
)
def test_a_sidecar_that_describes_another_shard_is_refused(tmp_path, change, message):
    data.write_shard(tmp_path / "train.bin", [1, 2, 3])
    sidecar = json.loads((tmp_path / "train.json").read_text())
    change(sidecar)
    (tmp_path / "train.json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=message) as caught:
        data.open_shard(tmp_path / "train.bin")
    assert len(str(caught.value)) < 500


def test_interrupted_between_its_two_files_a_shard_is_refused(tmp_path, monkeypatch):
    path, names, replace = tmp_path / "train.bin", [], Path.replace
    data.write_shard(path, [1, 2, 3])
    monkeypatch.setattr(Path, "replace", lambda one, to: names.append(to) or (len(names) == 1 and replace(one, to)))
    data.write_shard(path, [4, 5])  # only the first of the two takes its place
    assert len(names) == 2
    with pytest.raises(UserError, match="its sidecar says"):
        data.open_shard(path)


def test_batches_come_in_the_order_of_the_text_and_begin_again():
    three = list(islice(data.Batches(np.arange(14, dtype="<u2"), batch_size=2, block_size=3), 3))
    assert three[0][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert three[0][1].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert three[1][0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert three[2][0].tolist() == three[0][0].tolist()  # 12 and 13 do not fill a batch
    two = list(islice(data.Batches(np.arange(12, dtype="<u2"), batch_size=2, block_size=3), 2))
    assert two[1][0].tolist() == two[0][0].tolist()  # 6 to 11 fill one, but the token after them is not there


def test_the_last_batch_needs_the_token_after_it():
    assert next(data.Batches(np.arange(7, dtype="<u2"), 2, 3))[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(UserError, match="too short for one batch"):
        data.Batches(np.arange(6, dtype="<u2"), 2, 3)


def test_several_shards_are_one_text(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 50).astype("<u2")
    data.write_shard(tmp_path / "train.bin", ids[:20])
    for number, part in enumerate((ids[20:21], ids[21:50]), 1):
        data.write_shard(tmp_path / f"shards/{number:06}.bin", part)
    names = [{"path": f"data/{name}"} for name in ("val.bin", "train.bin", "shards/000001.bin", "shards/000002.bin")]
    (tmp_path / "shards/manifest.json").write_text(json.dumps({"shards": names}))
    (tmp_path / "shards/stray.bin").write_bytes(b"x")
    shards = data.open_shards(tmp_path / "train.bin", tmp_path / "shards")
    assert len(shards) == 50
    for start, stop in combinations(range(52), 2):
        assert shards[start:stop].tolist() == ids[start:stop].tolist()
    parts = (hashlib.sha256(part.tobytes()).hexdigest() for part in (ids[:20], ids[20:21], ids[21:]))
    assert shards.sha256 == hashlib.sha256("".join(parts).encode()).hexdigest()
    for (x, y), (expected_x, expected_y) in zip(
        islice(data.Batches(shards, 2, 3), 20), islice(data.Batches(ids, 2, 3), 20), strict=True
    ):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    (tmp_path / "shards/000002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="000002"):
        data.open_shards(tmp_path / "train.bin", tmp_path / "shards")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 5}', '{"shards": [{"path": 5}]}', '{"shards": [5]}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    data.write_shard(tmp_path / "train.bin", [1, 2, 3])
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: no manifest of shards; run `dvc repro -f tokenize`"):
        data.open_shards(tmp_path / "train.bin", tmp_path)


def test_shuffled_batches_are_the_same_rows_in_another_order_in_every_epoch():
    shard = np.arange(8 * 5 + 1, dtype="<u2")  # 8 rows of 5 tokens
    batches = data.Batches(shard, 2, 5, seed=1)
    epochs = [[row for x, _ in islice(batches, 4) for row in x.tolist()] for _ in range(3)]
    in_order = [row for x, _ in islice(data.Batches(shard, 2, 5), 4) for row in x.tolist()]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert len({str(epoch) for epoch in [*epochs, in_order]}) == 4
    assert [row for x, _ in islice(data.Batches(shard, 2, 5, seed=1), 4) for row in x.tolist()] == epochs[0]
    assert [row for x, _ in islice(data.Batches(shard, 2, 5, seed=2), 4) for row in x.tolist()] != epochs[0]
    x, y = next(data.Batches(shard, 2, 5, seed=1))
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 13])
def test_batches_go_on_from_a_position_that_went_through_json(seed, taken):
    shard = np.random.default_rng(0).integers(0, 50257, 42).astype("<u2")
    batches = data.Batches(shard, 2, 4, seed)
    for _ in range(taken):
        next(batches)
    other = data.Batches(shard, 2, 4, seed)
    other.position = json.loads(json.dumps(batches.position))
    for (x, y), (other_x, other_y) in zip(islice(batches, 12), islice(other, 12), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize(("epoch", "batch"), [(None, None), (0, 5), (0, -1), (-1, 0), (0.0, 0), ("0", 0)])
def test_a_position_that_is_none_is_refused(epoch, batch):
    batches = data.Batches(np.arange(42, dtype="<u2"), 2, 4)  # 5 batches an epoch
    with pytest.raises(ValueError, match="not a position"):
        batches.position = {"epoch": epoch, "batch": batch}


def test_a_vocabulary_that_two_bytes_cannot_count_is_refused():
    data.check_vocabulary(65535)
    with pytest.raises(UserError, match=r"^the encoding's ids go up to 65,536, .* hold 65,535; use GPT-2's"):
        data.check_vocabulary(65536)


def test_validation_sees_its_tokens_once():
    shard = np.arange(30, dtype="<u2")
    inputs = torch.cat([x for x, _ in data.first_batches(shard, 24, 2, 3)])
    assert inputs.flatten().tolist() == list(range(24))
    with pytest.raises(UserError, match=r"eval_tokens \(30\)"):
        data.first_batches(shard, 30, 2, 3)


def test_joined_batches_are_the_same_rows_in_the_same_order():
    shard = np.arange(100, dtype="<u2")
    three = [*islice(data.Batches(shard, 2, 8), 3)]
    for count in (1, 3):
        together = next(data.concatenate(data.Batches(shard, 2, 8), count))
        for ids, parts in zip(together, zip(*three[:count], strict=True), strict=True):
            assert torch.equal(ids, torch.cat(parts))
