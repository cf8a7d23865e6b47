"""Drawing tokens against transformers, and what the command says."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.using import sampling
from helpers import fake_hub
from helpers.common import REPOSITORY, environment, link_encoding, random_ids, tiny
from pipeline import ENVIRONMENT, run, write_json
from pipeline.tools import sample as command


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_greedy_tokens_are_those_of_transformers(tmp_path, attention, tie_weights):
    model = GPT(tiny(tie_weights=tie_weights, n_embd=32))
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5  # else a tied network repeats its last token
    hub_format.save_gpt(model, tmp_path)
    theirs, prompt = GPT2LMHeadModel.from_pretrained(tmp_path).eval(), random_ids(batch=3, time=4)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=28, eos_token_id=None
    )
    found = sampling.generate(hub_format.load_gpt(tmp_path, attention), prompt, 28)  # to the last of 32 positions
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


def test_a_nucleus_that_reaches_its_probability_exactly_takes_no_further_token():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    expected = TopPLogitsWarper(0.5)(None, logits)
    assert expected.isfinite().tolist() == [[True, False, False]]
    assert torch.equal(sampling.keep_likeliest(logits, top_p=0.5), expected)


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


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files):
    """A folder with all that the command reads, and a small network in models/trial."""
    text = (REPOSITORY / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("model: gpt2 ", "model: tiny "))
    monkeypatch.chdir(tmp_path)
    write_json(ENVIRONMENT, environment().model_dump())
    link_encoding(bpe_files)
    hub_format.save_gpt(GPT(tiny(vocab_size=50304)), command.TRIAL)
    return tmp_path


def test_the_command_prints_the_prompt_and_what_the_network_makes_of_it(checkout, encoding, capsys):
    command.main("--prompt", "Grüße \x1b[2J", "--length", "20", "--temperature", "0")
    ids = encoding.encode_ordinary("Grüße \x1b[2J")
    found = sampling.generate(hub_format.load_gpt(command.TRIAL, "flash"), torch.tensor([ids]), 20)[0]
    expected = command.CONTROLS.sub(lambda control: repr(control[0])[1:-1], encoding.decode(found.tolist()))
    assert expected.startswith(r"Grüße \x1b[2J")  # a network may not clear the screen
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("of", "said"),
    [("this one", "drawn here"), ("another", "a local file; nothing beside it says where it comes from")],
)
def test_a_word_on_where_weights_are_from_is_passed_on_if_it_speaks_of_these(checkout, capsys, of, said):
    weights = command.TRIAL / hub_format.WEIGHTS
    sha256 = files.sha256(weights) if of == "this one" else "0" * 64
    downloads.write_provenance(weights, "somewhere", sha256, "drawn here")
    command.main("--length", "1")
    assert capsys.readouterr().err == f"{command.TRIAL}: {said}\n"


def test_samples_differ_repeat_with_their_seed_and_stay_when_more_are_asked_for(checkout, capsys):
    texts = []
    for asked in (["2"], ["3"], ["3", "--seed", "7"]):
        command.main("--length", "8", "--samples", *asked)
        texts.append([text.split("\n", 1)[1] for text in capsys.readouterr().out.split("--- ")[1:]])
    assert texts[1][:2] == texts[0]
    assert len({text for some in texts for text in some}) == 3 + 3


def test_without_a_prompt_a_text_begins_after_the_end_of_another_which_is_not_shown(checkout, encoding, capsys):
    command.main("--length", "5", "--temperature", "0", "--random")
    model = GPT(params_yaml.load().size.gpt(), params_yaml.load().seed)
    expected = sampling.generate(model, torch.tensor([[encoding.eot_token]]), 5)[0, 1:]
    assert capsys.readouterr().out == encoding.decode(expected.tolist()) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples 0: must be 1 or more"),
        (["--length", "-3"], "--length -3: must be 1 or more"),
        (["--length", "many"], "argument --length: invalid int value: 'many'"),
        (["--temperature", "-1"], "--temperature -1.0: must be 0, or 0.000001 and more"),
        (["--temperature", "nan"], "--temperature nan: must be 0, or 0.000001 and more"),
        (["--top-k", "0"], "--top-k 0: must be 1 or more"),
        (["--top-p", "1.1"], "--top-p 1.1: must be above 0 and at most 1"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--tempo"], "unrecognized arguments: --tempo; all options: python -m pipeline.tools.sample --help"),
        (["--random", "--hub", "a/b"], "argument --hub: not allowed with argument --random"),
        (["--hub", "a/b/c"], "'a/b/c': a repository of the hub is called owner/name"),
        (["--hub", ""], "'': a repository of the hub is called owner/name"),
        ([""], ".: not a readable checkpoint"),
        (["--random", "--length", "3"], "model tiny needs 2,000,000,256.0 GB of memory,"),
        (["--hub", "a/b"], "a/b: the hub cannot be reached: HF_HUB_OFFLINE is set"),
        (["--prompt", "so " * 30, "--length", "3"], "31 tokens and 3 new ones are 34, over this network's n_positions"),
        (["nowhere"], "nowhere: not a readable checkpoint"),
        (["models/small"], "models/small: vocab_size 97 is below GPT-2's 50257"),
        (["--prompt", "x"], "models/trial: no network is there: `dvc repro trial` trains it"),
    ],
)
def test_what_cannot_be_done_is_one_line(checkout, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_format.save_gpt(GPT(tiny()), Path("models/small"))
    if arguments[0] == "--random" and len(arguments) == 3 and arguments[1] == "--length":
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text("n_positions: 1000000000".join(text.rsplit("n_positions: 1024", 1)))
    if arguments == ["--prompt", "x"]:  # as a trial leaves it that this machine cannot train
        shutil.rmtree(command.TRIAL)
        command.TRIAL.mkdir()
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")) as caught:
        run(command.main, *arguments)
    assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr().out == ""


@pytest.fixture
def ask_hub(checkout, monkeypatch, capsys):
    """A function that has a network of this `repository` write, while the hub has models/trial at `revision`.

    Returns what it printed and what was asked of the hub.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(checkout / "cache"))

    def ask(repository: str, revision: str, **hub_is: object) -> tuple[str, list[str]]:
        with fake_hub.serve(command.TRIAL, revision, **hub_is) as (endpoint, requests):
            template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            command.main("--hub", repository, "--length", "4", "--temperature", "0")
        return capsys.readouterr().out, requests

    return ask


@pytest.mark.parametrize(
    ("repository", "revision"),
    [("openai-community/gpt2-medium", pretrained.REVISIONS["gpt2-medium"]), ("somebody/gpt2", "main")],
)
def test_a_network_comes_from_the_hub_once_and_openais_at_the_pinned_commit(ask_hub, encoding, repository, revision):
    printed, requests = ask_hub(repository, revision)
    found = sampling.generate(hub_format.load_gpt(command.TRIAL, "flash"), torch.tensor([[encoding.eot_token]]), 4)[
        0, 1:
    ]
    assert printed == encoding.decode(found.tolist()) + "\n"
    assert f"GET /{repository}/resolve/{revision}/config.json" in requests
    assert ask_hub(repository.removeprefix("openai-community/"), revision) == (printed, [])


def test_both_files_come_from_the_commit_that_the_first_one_was_at(ask_hub):
    """The hub may move on between the two: it is asked for that commit, which this one, knowing main alone, has not."""
    with pytest.raises(UserError, match=r"resolve/a{40}/model\.safetensors: the server answered 404"):
        ask_hub("somebody/gpt2", "main", at="/config.json", headers={"X-Repo-Commit": "a" * 40})


def test_what_the_hub_does_not_have_or_is_not_the_pinned_file_is_an_error(ask_hub):
    with pytest.raises(UserError, match=r"gpt2-medium/resolve/[0-9a-f]*/config\.json: the server answered 404"):
        ask_hub("openai-community/gpt2-medium", "main")
    with pytest.raises(UserError, match=r"config\.json: sha256 is .* delete .*config\.json and get it again"):
        ask_hub("openai-community/gpt2", pretrained.REVISIONS["gpt2"])


def test_the_ladder_never_samples():
    assert "pipeline.tools.sample" not in (REPOSITORY / "dvc.yaml").read_text()
