"""Text becomes GPT-2's tokens and comes back unchanged."""

import numpy as np
import pytest
from transformers import GPT2Tokenizer

from gpt2_ladder.config import UserError
from gpt2_ladder.training import tokenizer


def test_the_encoding_equals_that_of_transformers(encoding, bpe_files):
    vocab_bpe, encoder_json = bpe_files
    reference = GPT2Tokenizer(vocab=str(encoder_json), merges=str(vocab_bpe))
    text = "First Citizen:\n\nWe'll   see 1595; naïve café, 你好 🙂\tend "
    assert encoding.encode_ordinary(text) == reference(text)["input_ids"]
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]
    assert encoding.n_vocab == 50257


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw.replace(b"a", b"b", 1), lambda _: b""])
def test_a_damaged_encoding_is_refused(bpe_files, tmp_path, damaged, change):
    paths = [tmp_path / path.name for path in bpe_files]
    for path, original in zip(paths, bpe_files, strict=True):
        path.write_bytes(original.read_bytes())
    tokenizer.open_encoding(*paths)
    paths[damaged].write_bytes(change(bpe_files[damaged].read_bytes()))
    with pytest.raises(UserError, match=rf"{paths[damaged].name}: sha256 is .* run `dvc repro -f download`"):
        tokenizer.open_encoding(*paths)
    if damaged:
        with pytest.raises(UserError, match=r"encoder\.json: sha256 is .* run `dvc repro -f download`"):
            tokenizer.count_bytes([], paths[1])


def test_tokens_are_counted_in_bytes_of_their_text(encoding, bpe_files):
    text = "First Citizen:\n\nnaïve café, 你好 🙂\tend "
    ids = np.array([*encoding.encode_ordinary(text), encoding.eot_token, *range(50256)])
    expected = len(text.encode()) + len(encoding.decode_bytes(list(range(50256))))
    assert tokenizer.count_bytes(np.array_split(ids, 50), bpe_files[1]) == expected  # <|endoftext|> is no text
