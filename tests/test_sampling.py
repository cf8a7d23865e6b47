"""Drawing tokens against transformers, and what the command says."""

from functools import partial

import pytest
import torch
from conftest import random_ids, tiny
from transformers import GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

from gpt2_ladder import hub, sampling
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_greedy_tokens_are_those_of_transformers(tmp_path, attention, tie_weights):
    model = GPT(tiny(tie_weights=tie_weights, n_embd=32))
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5  # else a tied network repeats its last token
    hub.save_gpt(model, tmp_path)
    theirs, prompt = GPT2LMHeadModel.from_pretrained(tmp_path).eval(), random_ids(batch=3, time=4)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=28, eos_token_id=None
    )
    found = sampling.generate(hub.load_gpt(tmp_path, attention), prompt, 28)  # to the last of 32 positions
    assert torch.equal(found, expected)
    assert len(set(found[:, 4:].flatten().tolist())) > 10


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, None), (7, None), (999, None), (None, 0.01), (None, 0.6), (None, 1.0), (7, 0.6)]
)
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p):
    logits = 3 * torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    logits[:, 10:20] = logits[:, 5:6]  # ties
    expected = logits if top_k is None else TopKLogitsWarper(top_k)(None, logits)
    expected = expected if top_p is None else TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(sampling.keep_likeliest(logits, top_k, top_p), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20_000, -1)
    drawn = sampling.draw(logits, 2.0, top_k=3, generator=torch.Generator().manual_seed(0))
    by_hand = torch.tensor([0.0, 1.0, 2.0, 3.0]).div(2).exp() * torch.tensor([0, 1, 1, 1])
    # the standard deviation of a share of 20,000 draws is at most 0.0035
    torch.testing.assert_close(drawn.flatten().bincount() / 20_000, by_hand / by_hand.sum(), rtol=0, atol=0.014)


def test_a_seed_repeats_and_another_one_does_not():
    first, again, other = (
        sampling.generate(
            GPT(tiny()), random_ids(time=4), 20, partial(sampling.draw, generator=torch.Generator().manual_seed(seed))
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_rows_that_pad_the_vocabulary_are_never_drawn_though_their_logits_are_the_largest(temperature):
    model, prompt = GPT(tiny(vocab_size=50304, tie_weights=False)), random_ids(batch=10, time=4)
    with torch.no_grad():
        model.lm_head.weight[50257:] = 0  # and then the constant that LayerNorm adds points at the last row
        model.lm_head.weight[50303] = 1000
        model.ln_f.bias += 1
        assert (model(prompt)[0].argmax(-1) == 50303).all()
    choose = partial(sampling.draw, temperature=temperature, generator=torch.Generator().manual_seed(0))
    drawn = sampling.generate(model, prompt, 8, choose)[:, 4:]
    assert drawn.max() < 50257


def test_more_tokens_than_positions_are_refused_before_the_first_and_as_many_are_not():
    assert sampling.generate(GPT(tiny()), random_ids(time=30), 2).shape == (2, 32)
    with pytest.raises(UserError, match="30 tokens and 3 new ones are 33, over this network's n_positions, 32"):
        sampling.stream(GPT(tiny()), random_ids(time=30), 3)


def test_text_comes_character_by_character_and_is_the_encodings(encoding):
    text, anything = "naïve 🙂 日本 Ω", random_ids(1, 500, 50257)[0].tolist()  # of which much is no UTF-8
    ids = encoding.encode_ordinary(text) + anything
    pieces = list(sampling.decode(ids, encoding))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == encoding.decode(ids)
    assert "".join(pieces).startswith(text)
    assert pieces[5:8] == ["日", "", "本"]  # the second one's three bytes are in two tokens
