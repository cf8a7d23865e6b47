"""Corpora of several files become shards with the tokens of the whole, even after interruptions."""

import base64
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_ladder import params_yaml
from gpt2_ladder.config import Data, UserError
from gpt2_ladder.sources import corpora, documents
from gpt2_ladder.training import data
from helpers import fake_hub, processes
from helpers.common import REPOSITORY, link_encoding, put_corpus
from pipeline import CORPUS, ENCODER_JSON, SHARDS, TRAIN_SHARD, VAL_SHARD, VOCAB_BPE, tokenize_corpus

URL = "/{repo_id}/resolve/{revision}/{filename}"
LETTERS = st.sampled_from(list("abs1'. \n\t\r\x0b\x1c\x85\u00a0\u2003\u3000é你\uff0c\u0e01\u0e31½🙂!")) | st.characters(
    exclude_categories=["Cs"]
)
DOCUMENTS = ["First Citizen:\nSpeak.\n", "naïve café, 你好 🙂 ", "an <|endoftext|> that is text", "\n\n  end  \n" * 40]


def make_settings(**changes) -> Data:
    settings = params_yaml.load(REPOSITORY / "params.yaml").data.model_dump()
    return Data(**{**settings, "val_tokens": 7, "shard_tokens": 50, **changes})


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files):
    """A folder with GPT-2's encoding, for the shards of corpora.write."""
    monkeypatch.chdir(tmp_path)
    link_encoding(bpe_files)


def write(settings, processes=1):
    corpora.write(settings, VOCAB_BPE, ENCODER_JSON, VAL_SHARD, TRAIN_SHARD, SHARDS, processes)


def tokens():
    """Return all tokens, validation first, and the number of shards."""
    shards = data.open_shards(TRAIN_SHARD, SHARDS)
    manifest = json.loads((SHARDS / "manifest.json").read_text())
    assert [shard["tokens"] for shard in manifest["shards"]][:2] == [7, 50]
    return [*data.open_shard(VAL_SHARD), *shards[:]], len(manifest["shards"])


def expected(encoding, documents):
    """Return the tokens of documents, joined by <|endoftext|>."""
    return [i for text in documents for i in (encoding.eot_token, *encoding.encode_ordinary(text))][1:]


def concatenate(encoding, parts):
    """Return the tokens of `parts`, one after the other."""
    return [i for part in parts for i in encoding.encode_ordinary(part)]


def parquet(table=None, **columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(table or pa.table(columns), file, row_group_size=2)
    return file.getvalue()


def column(texts, kind):
    if not pa.types.is_dictionary(kind):
        return pa.array(texts, kind)
    words = pa.array(texts).dictionary_encode()
    indices, values = words.indices.cast(kind.index_type), words.dictionary.cast(kind.value_type)
    return pa.DictionaryArray.from_arrays(indices, values, ordered=kind.ordered)


def write_parquet(path, documents, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(parquet(text=documents, **columns))


@given(st.text(LETTERS, max_size=80) | st.text(" \n\t\r\u00a0a", max_size=80) | st.text(max_size=80), st.integers(1, 5))
@example("a\n\nb", 3)  # "a\n\n" on its own would have one token for both line feeds
@example("\u00a0" + "\n" * 50 + "b", 2)  # line feeds merge in pairs, except the last one
@example("don't 's ''s", 1)
@settings(max_examples=400, deadline=None)
def test_a_text_in_parts_has_the_tokens_of_the_whole(encoding, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        parts = [*documents.parts("a.txt", [text])]
    assert "".join(parts) == text
    assert concatenate(encoding, parts) == encoding.encode_ordinary(text)


def test_the_only_ascii_white_space_in_one_token_is_two_line_feeds(encoding):
    """This allows cuts in a run of white space."""
    blanks = b" \t\n\x0b\x0c\r"
    for token in encoding.token_byte_values():
        for first, second in itertools.pairwise(token):
            assert token == b"\n\n" or (second != ord("\n") and not (first in blanks and second in blanks))


@pytest.mark.parametrize("source", ["text", "parquet"])
@pytest.mark.parametrize(
    ("run", "count"),
    [
        (" " * 10**6, 10**6 + 1),
        ("\t" * 10**6, 10**6 + 2),
        ("\n" * 10**6, 5 * 10**5 + 3),  # all but the last merge in pairs
        ("\r\n" * 10**6, 2 * 10**6 + 2),
    ],
    ids=["blanks", "tabs", "line feeds", "DOS line ends"],
)
def test_a_million_white_space_characters_have_the_tokens_of_the_whole(checkout, encoding, source, run, count):
    text, some = f"a{run}b", f"a{run[:300_000]}b"
    assert concatenate(encoding, documents.parts("", [some])) == encoding.encode_ordinary(some)
    path = Path(f"raw.{source}")
    path.write_bytes(text.encode() if source == "text" else parquet(text=["one", text, "two"]))
    write(make_settings(source=source, path=str(path), shard_tokens=10**7))
    ids = np.concatenate([data.open_shard(VAL_SHARD), data.open_shard(TRAIN_SHARD)])
    assert len(ids) == count + 4 * (source == "parquet")
    assert encoding.decode(ids.tolist()) == (text if source == "text" else f"one<|endoftext|>{text}<|endoftext|>two")


DRAW = random.Random(0)
WITHOUT_SPACES = {
    "base64": base64.b64encode(DRAW.randbytes(9000)).decode(),
    "minified": "".join(DRAW.choices(["function(){return_1}", "x='y';", "a.b(c)", "if(!d)", "[1,2]"], k=1500)),
    "Chinese": "".join(DRAW.choices("的一是不了人我在有他这中、。", k=9000)),
    "Thai": "".join(DRAW.choices("\u0e01\u0e02\u0e04\u0e07\u0e08\u0e31\u0e34\u0e48", k=9000)),
}


@pytest.mark.parametrize("text", WITHOUT_SPACES.values(), ids=WITHOUT_SPACES)
def test_text_without_spaces_is_cut_between_letters_digits_and_signs(encoding, monkeypatch, text):
    monkeypatch.setattr(documents, "PIECE", 100)
    parts = [*documents.parts("a.txt", [text])]
    assert max(map(len, parts)) <= 200
    assert concatenate(encoding, parts) == encoding.encode_ordinary(text)


def test_a_long_word_is_searched_at_most_twice(monkeypatch):
    searched = []
    monkeypatch.setattr(documents, "_ends", lambda pair: searched.append(pair) or pair == "a1")
    monkeypatch.setattr(documents, "PIECE", 100)
    text = "a" * 50_000 + "1" * 50_000
    assert "".join(documents.parts("a.txt", [text])) == text
    assert len(text) <= len(searched) <= 2 * len(text)


def test_a_word_of_1_mib_is_accepted():
    word = "a" * 2**20
    assert [*documents.parts("a.txt", [f"1{word}1"])] == ["1", word, "1"]


def test_text_files_become_shards_joined_by_endoftext(checkout, encoding, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 16)
    for number, document in enumerate(DOCUMENTS):
        path = Path(f"raw/{number}/a.txt")
        path.parent.mkdir(parents=True)
        path.write_text(document, encoding="utf-8-sig" if number == 1 else "utf-8")  # the mark is not text
    write(make_settings(source="text", path="raw"), processes=2)
    ids, count = tokens()
    assert ids == expected(encoding, DOCUMENTS)
    assert count == 1 + -(-(len(ids) - 7) // 50)
    manifest = json.loads((SHARDS / "manifest.json").read_text())
    assert [*manifest["made_of"]["inputs"]] == [f"raw/{number}/a.txt" for number in range(4)]


@pytest.mark.parametrize("source", ["text", "parquet"])
def test_hidden_and_empty_files_are_skipped(checkout, encoding, source):
    suffix = {"text": "txt", "parquet": "parquet"}[source]
    contents = {
        name: f"{name} is a file, and this is its text"
        for name in ("a", "b/a", ".hidden", "._b", ".checkpoints/x", "b/.c/d")
    }
    for name, text in {**contents, "0": "", "c": ""}.items():
        path = Path(f".raw/{name}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if source == "text" else parquet(text=[text]))

    def read(path):
        write(make_settings(source=source, path=path, shard_tokens=1000))
        return [*data.open_shard(VAL_SHARD), *data.open_shard(TRAIN_SHARD)]

    assert read(".raw") == expected(encoding, [contents["a"], contents["b/a"]])
    for name in (".hidden", ".checkpoints/x"):  # if named in data.path
        assert read(f".raw/{name}.{suffix}") == expected(encoding, [contents[name]])
    assert read(".raw/b/.c") == expected(encoding, [contents["b/.c/d"]])


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.uint32(), pa.large_string(), ordered=True)),
    ],
    ids=str,
)
def test_parquet_rows_are_documents_and_empty_rows_are_skipped(checkout, encoding, monkeypatch, kind):
    monkeypatch.setattr(documents, "PIECE", 30)
    write_parquet(Path("raw/a.parquet"), column([DOCUMENTS[0], None, DOCUMENTS[1], ""], kind), n=[1, 2, 3, 4])
    write_parquet(Path("raw/b.parquet"), column(DOCUMENTS[2:], kind))
    write(make_settings(source="parquet", path="raw"))
    assert tokens()[0] == expected(encoding, DOCUMENTS)


def test_fineweb_edu_is_downloaded_at_its_commit_and_removed_after_reading(
    checkout, encoding, monkeypatch, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("hub")
    write_parquet(folder / "000_00000.parquet", DOCUMENTS[:2])
    write_parquet(folder / "001_00000.parquet", DOCUMENTS[2:])
    monkeypatch.setattr(corpora, "FINEWEB_FILES", [f"sample/10BT/{name.name}" for name in sorted(folder.iterdir())])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub.serve(folder, corpora.FINEWEB_COMMIT) as (endpoint, requests):
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + URL)
        write(make_settings(source="fineweb-edu"))
    assert tokens()[0] == expected(encoding, DOCUMENTS)
    at = f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{corpora.FINEWEB_COMMIT}/sample/10BT"
    assert {request.split()[1] for request in requests} == {f"{at}/00{number}_00000.parquet" for number in range(2)}
    count = len(json.loads((SHARDS / "manifest.json").read_text())["shards"]) - 2
    names = [f"{number:06}.{suffix}" for number in range(1, count + 1) for suffix in ("bin", "json")]
    assert sorted(path.name for path in SHARDS.iterdir()) == [*names, "manifest.json"]


def test_complete_shards_are_kept_and_missing_ones_written_again(checkout, encoding, monkeypatch, capsys):
    monkeypatch.setattr(documents, "PIECE", 30)
    write_parquet(Path("raw.parquet"), DOCUMENTS * 5)
    wanted = make_settings(source="parquet", path="raw.parquet")
    write(wanted)
    ids, count = tokens()
    (SHARDS / "000004.bin").unlink()  # the sixth
    paths = (VAL_SHARD, TRAIN_SHARD, *sorted(SHARDS.glob("*.bin")))
    times = {path: path.stat().st_mtime_ns for path in paths}
    capsys.readouterr()
    write(wanted)
    assert "resuming after 5 shards" in capsys.readouterr().out
    assert tokens() == (ids, count)
    assert [path.stat().st_mtime_ns == before for path, before in times.items()] == [True] * 5 + [False] * (count - 6)
    other = wanted.model_copy(update={"shard_tokens": 49})
    write(other)
    assert len(data.open_shard(TRAIN_SHARD)) == 49
    raw = TRAIN_SHARD.read_bytes()
    TRAIN_SHARD.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    write(other)
    assert [*data.open_shard(VAL_SHARD), *data.open_shards(TRAIN_SHARD, SHARDS)[:]] == ids


@pytest.mark.slow
def test_killed_while_it_tokenizes_the_next_run_writes_the_same_shards(checkout, encoding):
    """SIGKILL only the stage: its worker processes must end by themselves."""
    write_parquet(Path("raw.parquet"), DOCUMENTS * 1000)
    program = """
import sys
from pathlib import Path
from gpt2_ladder.sources import documents
documents.PIECE = 2000
from test_corpora import make_settings, write
if __name__ == "__main__":
    write(make_settings(source="parquet", path="raw.parquet", shard_tokens=5000), processes=2)
"""
    environment = os.environ | {"PYTHONPATH": f"{processes.IMPORTABLE}:{REPOSITORY / 'tests/sources'}"}
    Path("program.py").write_text(program)
    for lines in (1, 4, 2):  # one per shard, after the line about resuming
        process = subprocess.Popen([sys.executable, "program.py"], env=environment, stdout=subprocess.PIPE, text=True)
        assert all(process.stdout.readline() for _ in range(lines))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # worker processes would keep the pipe open
    done = subprocess.run(
        [sys.executable, "program.py"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert re.match(r"data/shards: resuming after [4-9] shards\n", done.stdout)
    ids = [*data.open_shard(VAL_SHARD), *data.open_shards(TRAIN_SHARD, SHARDS)[:]]
    assert ids == expected(encoding, DOCUMENTS * 1000)
    (SHARDS / ".writing-x").mkdir()  # as after a kill
    write(make_settings(source="parquet", path="raw.parquet", shard_tokens=10**6))
    assert [path.name for path in SHARDS.iterdir()] == ["manifest.json"]


def test_a_corpus_of_13_000_files_resumes_too(checkout, capsys):
    Path("raw").mkdir()
    for number in range(13_000):
        Path(f"raw/{number}.txt").write_text("a b")
    wanted = make_settings(source="text", path="raw", shard_tokens=10**6)
    write(wanted)
    assert (SHARDS / "manifest.json").stat().st_size > 2**20
    write(wanted)
    assert "resuming after 2 shards" in capsys.readouterr().out


def test_a_refused_corpus_leaves_the_shards_of_the_previous_one(checkout, encoding):
    write_parquet(Path("raw.parquet"), DOCUMENTS)
    write(make_settings(source="parquet", path="raw.parquet"))
    before = tokens()
    write_parquet(Path("raw.parquet"), [*DOCUMENTS, "a" * 2**21])
    with pytest.raises(UserError, match=r"^raw\.parquet: row 5: a word of more than 1,048,576 bytes at offset 0;"):
        write(make_settings(source="parquet", path="raw.parquet", val_tokens=10**6))
    assert tokens() == before


WHOLE = parquet(text=DOCUMENTS * 50)
FLIPPED = WHOLE[:-7] + bytes([WHOLE[-7] ^ 255]) + WHOLE[-6:]  # in the footer's length
TWICE = parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
UTF16 = r"a\.txt: this is UTF-16{0}, not UTF-8; convert it, for example: iconv -f UTF-16{0} -t UTF-8 raw/a\.txt"


NO_TEXT = r"data\.path = raw: contains no text; set another data"
UNREADABLE = {
    "Latin-1": ("a.txt", "ok\nnaïve é".encode("latin-1"), r"a\.txt:2: byte 0xef at offset 5 is not UTF-8 .*iconv"),
    "cut text": ("a.txt", b"n\n" + b"n" * (2**20 - 2) + b"\xe4\xbd", r"a\.txt:2: byte 0xe4 at offset 1048576 is not"),
    "after a mark": ("a.txt", b"\xef\xbb\xbfa mark\nb\xff", r"a\.txt:2: byte 0xff at offset 11 is not UTF-8"),
    "UTF-16 with a mark": ("a.txt", "Hello\n".encode("utf-16"), UTF16.format("")),
    "UTF-16LE": ("a.txt", "Hello\n".encode("utf-16-le"), UTF16.format("LE")),
    "UTF-16BE": ("a.txt", "Hello\n".encode("utf-16-be"), UTF16.format("BE")),
    "Russian": ("a.txt", "Привет, мир\n".encode("utf-16-le"), UTF16.format("LE")),
    "Chinese": ("a.txt", "这是文本。\n".encode("utf-16-le"), r"a\.txt:1: byte .* is not UTF-8 .*iconv -f UTF-16 "),
    "one word": ("a.txt", "Приветмир".encode("utf-16-le"), UTF16.format("LE")),
    "UTF-32 with a mark": ("a.txt", "Hello\n".encode("utf-32"), r"a\.txt: this is UTF-32, .*iconv -f UTF-32 "),
    "UTF-32BE": ("a.txt", "Hello\n".encode("utf-32-be"), r"a\.txt: this is UTF-32BE, .*iconv -f UTF-32BE "),
    "empty": ("a.txt", b"", NO_TEXT),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", NO_TEXT),
    "long word": ("a.txt", b"b\n1" + b"a" * (2**20 + 1), r"a\.txt: a word of more than 1,048,576 bytes at offset 3"),
    "no parquet": ("a.parquet", b"PAR1 and nothing else PAR1", r"a\.parquet: not a readable parquet file: "),
    "cut": ("a.parquet", WHOLE[: len(WHOLE) // 2], r"a\.parquet: not a readable parquet file: "),
    "flipped": ("a.parquet", FLIPPED, r"a\.parquet: not a readable parquet file: "),
    "no column": ("a.parquet", parquet(body=["a"], n=[1]), r"no column 'text'; set data\.column to one of body, n"),
    "twice": ("a.parquet", TWICE, r"more than one column 'text'; set data\.column to one of text, text"),
    "numbers": ("a.parquet", parquet(text=[1, 2]), r"column 'text' contains int64, not text"),
    "list": ("a.parquet", parquet(text=[["a"]]), r"column 'text' contains list<element: string>, not text"),
    "no rows": ("a.parquet", parquet(text=pa.array([], pa.string())), NO_TEXT),
    "no file": ("a.csv", b"", r"data\.path = raw: not a file or a folder with \*\.txt files"),
    "hidden": (".a.txt", b"hidden", r"data\.path = raw: not a file or a folder with \*\.txt files"),
    "too short": ("a.txt", b"too short", r"data\.val_tokens = 7: leaves no training tokens; reduce"),
    "few bytes": ("a.txt", b"a1a1a1a", r"data\.val_tokens = 7: only 7 bytes of text; reduce data\.val_tokens"),
}


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_corpus_that_cannot_be_read_is_one_error_line(checkout, name, content, message):
    source = "parquet" if name == "a.parquet" else "text"
    Path("raw").mkdir()
    Path(f"raw/{name}").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        write(make_settings(source=source, path="raw"))
    assert len(str(caught.value).splitlines()) == 1
    assert not TRAIN_SHARD.exists()
    assert SHARDS.exists() == VAL_SHARD.exists()


def test_a_killed_worker_process_is_reported(checkout, monkeypatch):
    monkeypatch.setattr(corpora, "encode", _die)
    write_parquet(Path("raw.parquet"), DOCUMENTS)
    with pytest.raises(UserError, match="a tokenizing process was killed; free some memory"):
        write(make_settings(source="parquet", path="raw.parquet"), processes=2)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_stage_reads_the_corpus_in_params_yaml(checkout, monkeypatch, encoding):
    text = (REPOSITORY / "params.yaml").read_text()
    text = text.replace("source: tiny-shakespeare", "source: text").replace("val_tokens: 1000000", "val_tokens: 7")
    Path("params.yaml").write_text(text.replace("shard_tokens: 100000000", "shard_tokens: 50"))
    put_corpus(monkeypatch, b"First Citizen:\nSpeak.\n" * 30)
    tokenize_corpus.main()
    assert tokens()[0] == encoding.encode_ordinary(CORPUS.read_text())
    Path("params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    tokenize_corpus.main()
    assert [path.name for path in SHARDS.iterdir()] == ["manifest.json"]
