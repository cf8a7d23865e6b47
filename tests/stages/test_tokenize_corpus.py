"""The tokenize stage on unclean texts: every byte comes back, or one line reports the problem."""

import shutil

import pytest
from dvc.repo import Repo

from gpt2_ladder.config import UserError
from gpt2_ladder.training import data
from helpers.common import REPOSITORY, link_encoding, put_corpus
from pipeline import CORPUS, TRAIN_SHARD, VAL_SHARD, tokenize_corpus


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files):
    """A folder with all files that the stage reads except the corpus."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    link_encoding(bpe_files)


@pytest.mark.parametrize(
    "raw",
    [
        b"one\r\ntwo\r\n\r\nthree\rfour\n\r",
        b"with a byte order mark \xef\xbb\xbf that is not at the start",
        b"NULs \0\0\0 and \x1b[31m and \x7f\x01",
        "a b\u2028c\u00a0d\U0001f642\u0301\ufffd\ufffe".encode(),
        b"<|endoftext|> is text here, <|endoftext|>",
        b" " * 10_000 + b"a",
        b"a" + b"\n" * 1_200_000 + b" b" * 100_000,
        b"no end of the line " * 50_000,  # 1 MB
        b"a" * 1_000_000,  # one word to the encoding: merged in n log n since tiktoken 0.8, in n * n before
    ],
    ids=["line ends", "mark", "NULs", "unicode", "special", "blanks", "line feeds", "long line", "long word"],
)
def test_every_byte_comes_back(checkout, monkeypatch, encoding, raw):
    put_corpus(monkeypatch, raw)
    tokenize_corpus.main()
    shards = [data.open_shard(path).tolist() for path in (TRAIN_SHARD, VAL_SHARD)]
    assert b"".join(encoding.decode_single_token_bytes(token) for ids in shards for token in ids) == raw
    assert encoding.eot_token not in shards[0] + shards[1]  # an <|endoftext|> in the text is not a separator


@pytest.mark.parametrize("raw", [b"good\n\xff\xfeg\0o\0o\0d\0", b"cut short \xe4\xbd", b"\xed\xa0\x80 a surrogate"])
def test_text_that_is_not_utf8_is_refused_before_anything_is_written(checkout, monkeypatch, raw):
    put_corpus(monkeypatch, raw)
    with pytest.raises(UserError, match=r"^data/input\.txt:[12]: byte 0x.. at offset \d+ is not UTF-8"):
        tokenize_corpus.main()
    assert not TRAIN_SHARD.exists()


def test_a_damaged_corpus_is_refused_before_anything_is_written(checkout, monkeypatch):
    put_corpus(monkeypatch, b"First Citizen:\n")
    CORPUS.write_text("First Citizen:\nEVIL LINE\n")
    with pytest.raises(UserError, match=r"^data/input\.txt: sha256 is .*; run `dvc repro -f download`$"):
        tokenize_corpus.main()
    assert not TRAIN_SHARD.exists()


@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # of a package inside DVC
def test_a_new_shard_replaces_a_damaged_one_in_dvcs_cache(checkout, monkeypatch):
    put_corpus(monkeypatch, b"Before we proceed any further, hear me speak.\n" * 20)
    with Repo.init(no_scm=True) as repo, repo.config.edit("local") as settings:
        settings["cache"] = {"type": "hardlink"}
    tokenize_corpus.main()
    expected = TRAIN_SHARD.read_bytes()
    for damage in (True, False):
        with Repo() as repo:
            repo.add(str(TRAIN_SHARD))  # as DVC does after a stage
        if damage:
            TRAIN_SHARD.chmod(0o644)  # root may write without that
            with TRAIN_SHARD.open("ab") as file:
                file.write(b"\1\0")
            TRAIN_SHARD.chmod(0o444)
            tokenize_corpus.main()
    assert TRAIN_SHARD.read_bytes() == expected
