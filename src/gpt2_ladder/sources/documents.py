"""Read text and parquet files in pieces of limited size, without changing the tokens of any document."""

import codecs
import json
import shlex
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from gpt2_ladder.config import UserError
from gpt2_ladder.files import printable

Piece = list[str]  # texts, joined by <|endoftext|>; the first is "" unless the piece begins inside a document
PIECE = 2**17  # about the number of characters in a piece
LONGEST = 2**20  # bytes of a word; tiktoken takes 1 s for so long a word, and fails at 10**6 white-space characters
# Pairs of characters between which a GPT-2 token always ends. GPT-2's pattern never looks back. It ends a token where
# the kind of character (letter, digit, white space, other) changes, except sometimes after an apostrophe or space. It
# matches a run of white space as a whole, but no token contains two adjacent ASCII white-space characters, except two
# line feeds, or other white space before a line feed. tiktoken matches the pairs: Python's Unicode version differs.
ENDS = r"\S\s|\p{L}\P{L}|\p{N}\P{N}|[^\s\p{L}\p{N}'][\p{L}\p{N}]|'\p{N}|[ \t-\r][ \t\x0b-\r]|[^\S\n]\n"
CONTROLS = bytes({*range(32)} - {*b"\t\n\x0b\f\r\x1b"})  # rare in UTF-8; every second byte of ASCII text in UTF-16
BYTES = {bytes([value]): value for value in range(256)}
_ends = lru_cache(2**16)(tiktoken.Encoding("", pat_str=ENDS, mergeable_ranks=BYTES, special_tokens={}).encode_ordinary)


def pieces(path: Path, column: str | None) -> Iterator[Piece]:
    """Yield the pieces of a text file (one document) or of a parquet file (each row of `column` is one document).

    Skip documents without text. Raise UserError if the file cannot be read or has a word of more than LONGEST bytes.
    """
    documents = iter([(str(path), read_text(path))]) if column is None else _rows(path, column)
    piece, size = [""], 0
    for name, texts in documents:
        for later, part in enumerate(parts(name, texts)):
            if later or size > PIECE:
                yield piece
                piece, size = [] if later else [""], 0
            piece.append(part)
            size += len(part)
    if size:
        yield piece


def parts(name: str, texts: Iterable[str]) -> Iterator[str]:
    """Split a document between two tokens and yield the parts; raise UserError if a word is longer than LONGEST."""
    text, searched, offset = "", 1, 0

    def is_end(index: int) -> object:  # true if a token ends before text[index]
        pair = text[index - 1 : index + 1]
        return _ends(pair) or (pair == "\n\n" and (index - len(text[:index].rstrip("\n"))) % 2 == 0)

    for chunk in (some[start : start + PIECE] for some in texts for start in range(0, len(some), PIECE)):
        text += chunk
        if len(text) > PIECE:
            indices = range(searched, len(text))
            first, searched = next(filter(is_end, indices), None), len(text)
            if len(text[:first].encode()) > LONGEST:
                raise UserError(f"{name}: a word of more than {LONGEST:,} bytes at offset {offset}; split or remove it")
            if first:
                last = next(filter(is_end, reversed(indices)))
                yield text[:last]
                text, searched, offset = text[last:], 1, offset + len(text[:last].encode())
    if text:
        yield text


def read_text(path: Path) -> Iterator[str]:
    """Yield a text file in parts, without its byte order mark; raise UserError if it is not UTF-8."""
    with path.open("rb") as file:
        raw, line = file.read(PIECE), 1
        name = json.detect_encoding(raw).upper().replace("-LE", "LE").replace("-BE", "BE")  # iconv's spelling
        even, odd = (len(half) - len(half.translate(None, CONTROLS)) for half in (raw[::2], raw[1::2]))
        if raw.isascii() and max(even, odd) > 3 * min(even, odd) + 2 + len(raw) // 100:
            name = "UTF-16BE" if even > odd else "UTF-16LE"
        quoted = shlex.quote(str(path)).replace("{", "{{").replace("}", "}}")
        convert = f"convert it, for example: iconv -f {{}} -t UTF-8 {quoted} > converted.txt"
        if not name.startswith("UTF-8"):
            raise UserError(f"{path}: this is {name}, not UTF-8; {convert.format(name)}")
        file.seek(len(codecs.BOM_UTF8) if name == "UTF-8-SIG" else 0)
        try:
            for text in codecs.iterdecode(iter(partial(file.read, PIECE), b""), "utf-8"):
                yield text
                line += text.count("\n")
        except UnicodeDecodeError as error:
            offset = file.tell() - len(error.object) + error.start
            line += error.object.count(b"\n", 0, error.start)
            wrong = f"byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8 ({error.reason})"
            fix = convert.format("UTF-16" if error.object.count(0) > len(error.object) // 100 else "LATIN1")
            raise UserError(f"{path}:{line}: {wrong}; {fix}") from None


def _rows(path: Path, column: str) -> Iterator[tuple[str, Iterable[str]]]:
    try:
        # read as a stream, because pyarrow would otherwise load a whole row group, which may be of any size
        with pq.ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if names.count(column) != 1:
                wrong = f"{'more than one' if column in names else 'no'} column {column!r}"
                raise UserError(f"{path}: {wrong}; set data.column to one of {', '.join(names):.200}")
            kind = file.schema_arrow.field(column).type
            text = kind.value_type if pa.types.is_dictionary(kind) else kind
            if text not in (pa.string(), pa.large_string(), pa.string_view()):
                raise UserError(f"{path}: column {column!r} contains {kind}, not text; set data.column to another")
            batches = (batch.column(0).to_pylist() for batch in file.iter_batches(256, columns=[column]))
            for number, row in enumerate(chain.from_iterable(batches), 1):
                yield f"{path}: row {number}", [row or ""]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path}: not a readable parquet file: {reason:.300}; fetch or convert it again") from None
