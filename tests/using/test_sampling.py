"""`make sample`: which tokens are drawn, and what is printed."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from gpt2_ladder import files, params_yaml
from gpt2_ladder.files import write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format, pretrained
from helpers import fake_hub
from helpers.common import REPOSITORY, environment, link_encoding, random_ids, tiny
from pipeline import ENVIRONMENT, run
from pipeline.tools import sample as command


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files):
    """A folder with all files that the command reads, and a small network in models/trial."""
    text = (REPOSITORY / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("model: gpt2 ", "model: tiny "))
    monkeypatch.chdir(tmp_path)
    write_json(ENVIRONMENT, environment(threads=1).model_dump())
    link_encoding(bpe_files)
    hub_format.save_gpt(GPT(tiny(vocab_size=50304)), command.TRIAL)
    return tmp_path


@torch.no_grad()
def greedy(model: GPT, ids: list[int], length: int) -> list[int]:
    """Continue `ids` with the likeliest tokens, computed by our own network."""
    for _ in range(length):
        ids = [*ids, int(model(torch.tensor([ids]))[0][0, -1, :50257].argmax())]
    return ids


def test_text_is_printed_word_by_word(encoding, capsys):
    text, noise = "naïve 🙂 日本 Ω", random_ids(1, 500, 50257)[0].tolist()  # the noise is mostly invalid UTF-8
    ids = encoding.encode_ordinary(text) + noise
    printer, pieces = command.Printer(encoding, skip_prompt=True), []
    printer.on_finalized_text("Hi\x1b[2J")
    assert capsys.readouterr().out == r"Hi\x1b[2J"  # a network may not clear the screen
    printer.put(torch.tensor([[1, 2, 3]]))  # the context of a call of generate
    for token in ids:
        printer.put(torch.tensor([token]))
        pieces.append(capsys.readouterr().out)
    printer.end()
    printed = "".join(pieces) + capsys.readouterr().out
    assert [piece for piece in pieces if piece][:4] == ["naïve ", "🙂 ", "日", "本"]  # several tokens a character
    assert printed == command.CONTROLS.sub(lambda match: repr(match[0])[1:-1], encoding.decode(ids))


def test_a_text_longer_than_the_positions_continues_from_their_last_half():
    model = GPT(tiny())  # 32 positions
    printed, ids = [], random_ids(1, 3)
    printer = SimpleNamespace(put=printed.append, end=lambda: None)
    command.write(hub_format.to_transformers(model), ids, 50, printer, {"do_sample": False})
    contexts = [piece for piece in printed if piece.dim() == 2]
    new = [int(piece) for piece in printed if piece.dim() == 1]
    assert len(new) == 50
    assert [context.size(1) for context in contexts] == [3, 16, 16]
    text = [*ids[0].tolist(), *new]
    assert contexts[1][0].tolist() == text[16:32]
    assert contexts[2][0].tolist() == text[32:48]


@pytest.mark.parametrize("tied", [True, False])
def test_temperature_0_prints_the_prompt_and_the_likeliest_tokens(checkout, encoding, capsys, tied):
    model = GPT(tiny(vocab_size=50304, tie_weights=tied))
    hub_format.save_gpt(model, command.TRIAL)
    command.main("--prompt", "Grüße", "--length", "20", "--temperature", "0")
    expected = greedy(model, encoding.encode_ordinary("Grüße"), 20)
    assert tuple(capsys.readouterr()) == (encoding.decode(expected) + "\n", "")


def test_without_a_prompt_the_text_follows_endoftext_which_is_not_shown(checkout, encoding, capsys):
    command.main("--length", "5", "--temperature", "0", "--random")
    model = GPT(params_yaml.load().size.gpt(), params_yaml.load().seed)
    expected = greedy(model, [encoding.eot_token], 5)[1:]
    assert capsys.readouterr().out == encoding.decode(expected) + "\n"


@pytest.mark.parametrize("likeliest", ["<|endoftext|>", "a padded row"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_endoftext_does_not_end_a_text_and_padded_rows_are_never_drawn(
    checkout, encoding, capsys, likeliest, temperature
):
    model = GPT(tiny(vocab_size=50304, tie_weights=False))
    with torch.no_grad():  # the last LayerNorm gives ones
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1)
        model.lm_head.weight[50256] = 10
        model.lm_head.weight[50257:] = 20 if likeliest == "a padded row" else 0
    hub_format.save_gpt(model, command.TRIAL)
    command.main("--prompt", "a", "--length", "31", "--temperature", temperature)  # up to the last position
    assert capsys.readouterr().out == "a" + 31 * "<|endoftext|>" + "\n"


def test_top_k_and_top_p_limit_what_is_drawn(checkout, encoding, capsys):
    ids = [encoding.encode_ordinary(word)[0] for word in ("a", "b", "c", "d")]
    model = GPT(tiny(vocab_size=50257, tie_weights=False))
    with torch.no_grad():  # logits ln(4), ln(3), ln(2), ln(1) at every position, -100 for all other tokens
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1)
        model.lm_head.weight.fill_(-100 / 16)
        model.lm_head.weight[ids] = torch.tensor([4.0, 3, 2, 1]).log()[:, None] / 16
    hub_format.save_gpt(model, command.TRIAL)
    for options, expected in (
        ([], "abcd"),
        (["--top-k", "3"], "abc"),
        (["--top-k", "1"], "a"),
        (["--top-p", "0.5"], "ab"),  # 0.4 + 0.3 reach it
        (["--top-p", "0.3"], "a"),
        (["--top-k", "3", "--top-p", "0.75"], "ab"),  # 4/9 + 3/9 reach it
    ):
        command.main("--prompt", "!", "--length", "31", "--samples", "2", *options)
        texts = re.findall(r"!(.{31})\n", capsys.readouterr().out)
        assert len(texts) == 2
        assert "".join(sorted(set("".join(texts)))) == expected, options


def test_a_seed_repeats_its_samples_and_more_samples_keep_the_first(checkout, capsys):
    texts = []
    for options in (["2"], ["3"], ["3", "--seed", "7"]):
        command.main("--length", "8", "--samples", *options)
        texts.append([text.split("\n", 1)[1] for text in capsys.readouterr().out.split("--- ")[1:]])
    assert texts[1][:2] == texts[0]
    assert len({text for some in texts for text in some}) == 3 + 3


@pytest.mark.parametrize(
    ("recorded", "printed"), [("this file", "drawn here"), ("another", "a local file of unknown origin")]
)
def test_the_source_of_the_weights_is_printed_if_it_was_recorded(checkout, capsys, recorded, printed):
    weights = command.TRIAL / hub_format.WEIGHTS
    sha256 = files.sha256(weights) if recorded == "this file" else "0" * 64
    downloads.write_provenance(weights, "somewhere", sha256, "drawn here")
    command.main("--length", "1")
    assert capsys.readouterr().err == f"{command.TRIAL}: {printed}\n"


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
        (["--tempo"], "unrecognized arguments: --tempo; for all options, run python -m pipeline.tools.sample --help"),
        (["--random", "--hub", "a/b"], "argument --hub: not allowed with argument --random"),
        (["--hub", "a/b/c"], "'a/b/c': not a repository name; write it as owner/name"),
        (["--hub", ""], "'': not a repository name; write it as owner/name"),
        ([""], ".: not a readable checkpoint"),
        (["--random", "--length", "3"], "model tiny needs 2,000,000,256.0 GB of memory,"),
        (["--hub", "a/b"], "a/b: the hub cannot be reached: HF_HUB_OFFLINE is set"),
        (
            ["--prompt", "so " * 40, "--length", "3"],
            "--prompt: its 41 tokens leave none of this network's 32 positions; shorten it",
        ),
        (["nowhere"], "nowhere: not a readable checkpoint"),
        (["models/small"], "models/small: vocab_size 97 is below GPT-2's 50257"),
        (["--prompt", "x"], "models/trial: contains no network; train it with `dvc repro trial`"),
    ],
)
def test_invalid_arguments_are_one_line(checkout, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_format.save_gpt(GPT(tiny()), Path("models/small"))
    if arguments == ["--random", "--length", "3"]:
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text("n_positions: 1000000000".join(text.rsplit("n_positions: 1024", 1)))
    if arguments == ["--prompt", "x"]:  # a skipped trial leaves an empty folder
        shutil.rmtree(command.TRIAL)
        command.TRIAL.mkdir()
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")) as caught:
        run(command.main, *arguments)
    assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr().out == ""


@pytest.fixture
def sample_from_hub(checkout, monkeypatch, capsys):
    """A function that samples from a hub repository; the hub serves models/trial at `revision`.

    It returns what was printed and the requests to the hub.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(checkout / "cache"))

    def sample(repository: str, revision: str, **options: object) -> tuple[str, list[str]]:
        with fake_hub.serve(command.TRIAL, revision, **options) as (endpoint, requests):
            template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            command.main("--hub", repository, "--length", "4", "--temperature", "0")
        return capsys.readouterr().out, requests

    return sample


@pytest.mark.parametrize(
    ("repository", "revision"),
    [("openai-community/gpt2-medium", pretrained.REVISIONS["gpt2-medium"]), ("somebody/gpt2", "main")],
)
def test_a_hub_network_is_downloaded_once_and_openais_at_the_pinned_commit(
    sample_from_hub, encoding, repository, revision
):
    printed, requests = sample_from_hub(repository, revision)
    expected = greedy(hub_format.load_gpt(command.TRIAL), [encoding.eot_token], 4)[1:]
    assert printed == encoding.decode(expected) + "\n"
    assert f"GET /{repository}/resolve/{revision}/config.json" in requests
    assert sample_from_hub(repository.removeprefix("openai-community/"), revision) == (printed, [])


def test_both_files_come_from_the_commit_of_the_first(sample_from_hub):
    """The hub may receive a commit between the two requests; this hub has main only, not that commit."""
    with pytest.raises(command.UserError, match=r"resolve/a{40}/model\.safetensors: the server answered 404"):
        sample_from_hub("somebody/gpt2", "main", at="/config.json", headers={"X-Repo-Commit": "a" * 40})


def test_a_file_that_the_hub_lacks_or_that_is_not_the_pinned_one_is_an_error(sample_from_hub):
    with pytest.raises(command.UserError, match=r"gpt2-medium/resolve/[0-9a-f]*/config\.json: the server answered 404"):
        sample_from_hub("openai-community/gpt2-medium", "main")
    with pytest.raises(command.UserError, match=r"config\.json: sha256 is .* delete .*config\.json and fetch it again"):
        sample_from_hub("openai-community/gpt2", pretrained.REVISIONS["gpt2"])
