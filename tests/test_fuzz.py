"""Every reader accepts a damaged file or raises a UserError with clear lines, in bounded memory.

A reader is one row of READERS: its name, the files of a valid input, and the function that reads their folder. The
suite tries 100 damaged inputs of each, always the same; `pytest -m long -n 0` tries 10,000 new ones.
"""

import io
import json
import math
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.running.checkpoints import Checkpoints, Course
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import data
from gpt2_ladder.training.metrics import Step
from helpers.common import REPOSITORY, random_ids, tiny

Files = dict[str, bytes]
UNCLEAR = {"Cc", "Cs", "Zl", "Zp"}  # characters that break a line, move the cursor or cannot be printed
MEMORY = 2**30  # bytes that reading one input may take; a network of the valid sizes takes 100 kB

names = st.text(max_size=8) | st.sampled_from(["", "n_layer", "sha256", "wte.weight", "__metadata__", "\n", "\x1b[2J"])
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2, 10**9, 2**31, 2**63, 2**64, 10**30, math.nan])
values = st.recursive(
    st.none() | st.booleans() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


# valid or nearly valid YAML and JSON that a reader may not expect
PIECES = [b"[" * 1500, b'{"a":' * 1500, b"{a: " * 500, b"- " * 500, b"9" * 5000, b"0x" + b"f" * 5000, b"1e999", b"0b2"]
PIECES += [b"-.nan", b".inf", b"NaN", b"-Infinity", b"null", b"true", b"yes", b"~", b"1_000", b"0o17", b"190:20:30"]
PIECES += [b"!!binary ", b"!!python/object:os.system ", b"!!set ", b"!!omap ", b"!!int x", b"!!bool x", b"!a ", b"{}"]
PIECES += [b"2001-12-14", b"2001-99-99", b"!!timestamp ", b"&a ", b"*a", b"|\n", b">-\n", b"# ", b"'", b'"', b": "]
PIECES += [b"\n<<: {a: 1}\n", b"\n<<: [1]\n", b"\n? [a]\n: b\n", b"\n? {a: b}\n: b\n", b"\n%YAML 1.1\n---\n", b"\n"]
PIECES += [b"\n---\n", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b'"\\ud800"', b'"\\x1b[2J"', b'"\\n"', b'"\\u2028"']


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Replace up to three pieces of `valid` by others; sometimes return arbitrary bytes."""
    raw, pieces = bytearray(valid), st.binary(max_size=8) | st.sampled_from(PIECES)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(raw)))
        raw[start : start + draw(st.sampled_from([0, 1, 2, 8, 100, 10**9]))] = draw(pieces)
    return bytes(raw) if draw(st.integers(0, 9)) else draw(st.binary(max_size=200) | st.lists(pieces).map(b"".join))


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every map or list in a tree with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0):
        yield tree, key
        yield from places(tree[key])


@st.composite
def damaged_tree(draw: st.DrawFn, valid: Any) -> Any:
    """Change, remove or add up to three values in a tree of maps and lists; sometimes return another tree."""
    tree = json.loads(json.dumps(valid))  # a copy
    for _ in range(draw(st.integers(1, 3))):
        node, key = draw(st.sampled_from(list(places(tree)) or [({"": 0}, "")]))
        if draw(st.booleans()):
            del node[key]
        elif isinstance(node, list) or draw(st.booleans()):
            node[key] = draw(values)
        else:
            node[draw(names)] = draw(values)
    return draw(st.just(tree) | values) if draw(st.integers(0, 9)) == 0 else tree


def yaml(tree: Any) -> bytes:
    out = io.BytesIO()
    YAML(typ="safe").dump(tree, out)
    return out.getvalue()


def split(raw: bytes) -> tuple[Any, bytes]:
    """Return the header and the bytes of the tensors of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


@st.composite
def damaged_safetensors(draw: st.DrawFn, valid: bytes) -> bytes:
    """Write a wrong type, shape, offset or length into the header, and NaN or infinity into a tensor."""
    header, body = split(valid)
    if draw(st.booleans()):
        header = draw(damaged_tree(header))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(split(valid)[0])))
        lie = {
            "dtype": st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "X"]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 16, 48, 97, 2**32, 2**63, -1]), max_size=4),
            "data_offsets": st.lists(st.integers(0, len(body) + 8) | numbers, min_size=2, max_size=2),
        }
        field = draw(st.sampled_from(sorted(lie)))
        if isinstance(header, dict) and isinstance(header.get(name), dict):
            header[name][field] = draw(lie[field])
    raw = json.dumps(header).encode()
    length = draw(st.just(len(raw)) | st.integers(0, 2**64 - 1)) if draw(st.integers(0, 4)) == 0 else len(raw)
    if draw(st.booleans()):
        start = draw(st.integers(0, len(body) // 4 - 1)) * 4
        body = body[:start] + draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b""])) + body[start + 4 :]
    return length.to_bytes(8, "little") + raw + body


def damaged(name: str, raw: bytes) -> st.SearchStrategy[bytes]:
    """Damage `raw` in the ways that the type of the file `name` allows."""
    if name.endswith(".yaml"):
        return damaged_bytes(raw) | damaged_tree(YAML(typ="safe").load(raw)).map(yaml)
    if name.endswith(".json"):
        return damaged_bytes(raw) | damaged_tree(json.loads(raw)).map(lambda tree: json.dumps(tree).encode())
    if name.endswith(".safetensors"):
        return damaged_bytes(raw) | damaged_safetensors(raw)
    return damaged_bytes(raw)


def written(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def training(folder: Path) -> Checkpoints:
    """Return the checkpoints of a tiny training, in `folder`."""
    model = GPT(tiny())
    checkpoints = type("InFolder", (Checkpoints,), {"folder": folder})
    batches = data.Batches(np.arange(9, dtype="<u2"), 1, 4)
    return checkpoints("training", {}, model, torch.optim.AdamW(model.parameters()), batches, 1, Course(1))


def train_and_save(folder: Path) -> None:
    checkpoints = training(folder)
    checkpoints.model(random_ids(), random_ids())[1].backward()
    checkpoints.optimizer.step()
    checkpoints.save([Step(0, 4.6, 1.0, 1.0, 1.0, 2, 1.0)])


READERS: dict[str, tuple[Files, Callable[[Path], object]]] = {
    "params": (
        {"params.yaml": (REPOSITORY / "params.yaml").read_bytes()},
        lambda folder: params_yaml.load(folder / "params.yaml"),
    ),
    "shard": (
        written(lambda folder: data.write_shard(folder / "train.bin", [1, 2, 3, 50256])),
        lambda folder: data.open_shard(folder / "train.bin"),
    ),
    "checkpoint": (written(lambda folder: hub_format.save_gpt(GPT(tiny()), folder)), hub_format.load_gpt),
    "training": (written(train_and_save), lambda folder: training(folder).load()),
}


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Limit this process to MEMORY more bytes, so that a larger allocation fails."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # start the threads: their stacks count, too
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(read: Callable[[Path], object], files: Files) -> str | None:
    """Read `files`; return the message with which they were refused, or None if they were accepted."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name, raw in files.items():
            (Path(folder) / name).write_bytes(raw)
        try:
            read(Path(folder))
        except UserError as error:
            for line in str(error).split("\n"):
                clear = line.strip() and len(line) <= 1000 and not UNCLEAR & set(map(category, line))
                assert clear, f"not a clear line: {line!r:.1000}"
            return str(error)
    return None


def fuzz(reader: str, examples: int, repeatable: bool, record_property: Callable[[str, object], None]) -> None:
    valid, read = READERS[reader]
    # one or two damaged files
    some = st.lists(st.sampled_from(sorted(valid)), min_size=1, max_size=2, unique=True)
    inputs = some.flatmap(lambda names: st.fixed_dictionaries({name: damaged(name, valid[name]) for name in names}))
    accepted = []

    @settings(
        max_examples=examples,
        derandomize=repeatable,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(files: Files) -> None:
        accepted.append(refusal(read, valid | files) is None)

    run()
    print(f"{reader}: {sum(accepted)} of {len(accepted)} accepted")
    record_property("tried", len(accepted))
    assert any(accepted)  # otherwise only the reader's first check was reached
    assert not all(accepted)


@pytest.mark.parametrize("reader", READERS)
def test_the_valid_input_is_accepted(reader):
    valid, read = READERS[reader]
    assert refusal(read, valid) is None


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_input_is_accepted_or_refused_in_clear_lines(reader, record_property):
    fuzz(reader, examples=100, repeatable=True, record_property=record_property)


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand_damaged_inputs_are_accepted_or_refused_in_clear_lines(reader, record_property):
    fuzz(reader, examples=10_000, repeatable=False, record_property=record_property)
