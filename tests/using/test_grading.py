"""HellaSwag grades against transformers and arithmetic by hand, on questions of our own."""

import hashlib
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_ladder import config, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format, pretrained
from helpers.common import REPOSITORY, environment, link_encoding, tiny
from pipeline import ENVIRONMENT
from pipeline.tools import hellaswag as command

CPU = torch.device("cpu")
QUESTIONS = [
    (
        "A boy fills a kettle with water. He",
        ["puts it on the stove.", "eats it.", "paints the sea with a fork.", "runs."],
    ),
    ("The baker opens the oven and", ["takes out the bread.", "swims away.", "counts to a hundred in it.", "sleeps."]),
    (
        "[header] How to sharpen a pencil",
        ["Turn it in a sharpener.", "Boil it — twice.", "Ask it.", "Plant it in May."],
    ),
    ("Naïve café guests sit down. They", ["order.", "order the house to be painted.", "melt.", "bark 🙂 at the moon."]),
]
LINES = [json.dumps({"ind": 7, "ctx": ctx, "endings": ends, "label": 0, "split": "val"}) for ctx, ends in QUESTIONS]
BODY = ("\n".join(LINES) + "\n").encode()


def by_transformers(folder: Path, context: list[int], ending: list[int]) -> torch.Tensor:
    """Return the log probabilities of one ending's tokens, without a batch and padding."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logs = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)  # (T, V)
    return torch.stack([logs[len(context) - 1 + index, token] for index, token in enumerate(ending)])


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_a_batch_of_endings_has_the_log_probabilities_that_transformers_gives_each(tmp_path, attention):
    model = GPT(tiny())
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5  # otherwise all tokens are about equally likely
    hub_format.save_gpt(model, tmp_path)
    context, endings = [5, 80, 13], [[7], [96, 2, 44, 44, 8, 90, 1], [0, 0, 0], [33, 9]]
    sums, means = command.log_probabilities(hub_format.load_gpt(tmp_path, attention), context, endings, CPU)
    expected = [by_transformers(tmp_path, context, ending) for ending in endings]
    assert sums.std() > 1
    # another order of float32 operations: 1e-6 of sums near 30
    assert sums.tolist() == pytest.approx([logs.sum().item() for logs in expected], abs=1e-4)
    assert means.tolist() == pytest.approx([logs.mean().item() for logs in expected], abs=1e-4)


def test_acc_compares_whole_endings_and_acc_norm_their_mean_per_token(encoding):
    logits = torch.zeros(50257)
    for word, logit in ((" the", 10.0), (" a", 9.0), ("it", 9.5)):  # "it" without a space is in no ending
        logits[encoding.encode_ordinary(word)] = logit
    # ln(e**10 + e**9 + e**9.5 + 50254) = 11.4: " a" has -2.4, 3 x " the" -4.3 (-1.4 a token), others -11.4
    model = mock.Mock(side_effect=lambda idx: (logits.expand(*idx.shape, -1), None), config=tiny())
    examples = [{"ctx": "I see", "endings": ["a", "the the the", "zebra", "it"], "label": label} for label in (0, 1, 2)]
    assert list(command.grade(model, examples, encoding, CPU)) == [(True, False), (False, True), (False, False)]


def test_the_interval_is_the_wilson_interval():
    share, (low, high) = command.accuracy([True] * 3 + [False] * 7)
    z = 1.959963984540054  # 95 % of a normal distribution are within z standard deviations
    middle, half = (3 + z**2 / 2) / (10 + z**2), z / (10 + z**2) * (3 * 7 / 10 + z**2 / 4) ** 0.5
    assert (share, low, high) == (0.3, pytest.approx(middle - half), pytest.approx(middle + half))


def test_an_example_longer_than_the_context_is_reported(encoding):
    example = {"ctx": "so " * 40, "endings": ["a"] * 4, "label": 0}
    with pytest.raises(UserError, match="example 1 takes 41 positions; use a network with more than 32"):
        list(command.grade(GPT(tiny(vocab_size=50257)), [example], encoding, CPU))


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files, serve):
    """A folder with all files that the command reads, a stand-in in data/gpt2, and a server with our questions."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    write_json(ENVIRONMENT, environment().model_dump())
    link_encoding(bpe_files)
    size = params_yaml.load().models["tiny"].model_copy(update={"n_layer": 1, "n_embd": 16, "n_positions": 64})
    pretrained.fetch(Path("data/gpt2"), config.Pretrained(source="stand-in", folder=None), "tiny", size, seed=3)
    monkeypatch.setattr(command, "SHA256", hashlib.sha256(BODY).hexdigest())
    monkeypatch.setattr(command, "SOURCES", (serve(body=BODY),))


def test_the_command_grades_as_transformers_does(checkout, serve, encoding, capsys):
    command.main()
    result = json.loads(Path("results/hellaswag.json").read_text())
    correct = []
    for ctx, endings in QUESTIONS:
        ids = [encoding.encode_ordinary(" " + ending) for ending in endings]
        expected = [by_transformers(Path("data/gpt2"), encoding.encode_ordinary(ctx), ending) for ending in ids]
        scores = torch.tensor([[logs.sum(), logs.mean()] for logs in expected])
        correct.append((scores.argmax(0) == 0).tolist())
    assert [result["acc"], result["acc_norm"]] == torch.tensor(correct).float().mean(0).tolist()
    assert (result["n"], result["of"]) == (4, 4)
    assert result["acc_interval"][0] <= result["acc"] <= result["acc_interval"][1]
    assert (result["model"], result["source"]) == ("data/gpt2", downloads.STAND_IN)
    assert result["note"] == pretrained.STAND_IN_NOTICE
    assert "NOT verified: random stand-in" in capsys.readouterr().out
    command.main("--limit", "3")
    limited = json.loads(Path("results/hellaswag.json").read_text())
    assert (limited["n"], limited["of"]) == (3, 4)
    assert limited["acc"] == sum(whole for whole, _ in correct[:3]) / 3
    assert len(serve.requests) == 1  # the questions are downloaded once


@pytest.mark.parametrize("name", [hub_format.CONFIG, hub_format.WEIGHTS])
def test_damaged_weights_are_refused_before_the_download(checkout, serve, name):
    with (Path("data/gpt2") / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=rf"^data/gpt2/{name}: sha256 is .*; run `dvc repro -f download`$"):
        command.main()
    assert serve.requests == []


def test_a_limit_below_1_is_refused(checkout, serve):
    with pytest.raises(UserError, match="--limit 0: must be 1 or more"):
        command.main("--limit", "0")
    assert serve.requests == []
