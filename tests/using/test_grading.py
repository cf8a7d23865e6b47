"""Which ending a network finds likeliest, against transformers and by hand; the questions here are our own."""

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
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.using import grading
from helpers.common import REPOSITORY, environment, link_encoding, tiny
from pipeline import ENVIRONMENT, write_json
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
    """The log probabilities of one ending's tokens, alone and without any padding."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        everywhere = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
    return torch.stack([everywhere[len(context) - 1 + place, token] for place, token in enumerate(ending)])


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_endings_of_any_length_have_the_log_probabilities_that_transformers_gives_each_alone(tmp_path, attention):
    model = GPT(tiny())
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5  # else every token is about as likely as any
    hub_format.save_gpt(model, tmp_path)
    context, endings = [5, 80, 13], [[7], [96, 2, 44, 44, 8, 90, 1], [0, 0, 0], [33, 9]]
    sums, means = grading.log_probabilities(hub_format.load_gpt(tmp_path, attention), context, endings, CPU)
    alone = [by_transformers(tmp_path, context, ending) for ending in endings]
    assert sums.std() > 1
    # float32, another order of operations: 1e-6 of sums near 30
    assert sums.tolist() == pytest.approx([found.sum().item() for found in alone], abs=1e-4)
    assert means.tolist() == pytest.approx([found.mean().item() for found in alone], abs=1e-4)


def test_the_whole_ending_decides_for_acc_and_the_mean_of_its_tokens_for_acc_norm(encoding):
    logits = torch.zeros(50257)
    for word, logit in ((" the", 10.0), (" a", 9.0), ("it", 9.5)):  # "it" begins a text, no ending has it
        logits[encoding.encode_ordinary(word)] = logit
    # ln(e**10 + e**9 + e**9.5 + 50254) = 11.4: " a" has -2.4, three times " the" -4.3, or -1.4 a token, others -11.4
    model = mock.Mock(side_effect=lambda idx: (logits.expand(*idx.shape, -1), None), config=tiny())
    examples = [
        grading.Example(ctx="I see", endings=["a", "the the the", "zebra", "it"], label=label) for label in (0, 1, 2)
    ]
    assert list(grading.grade(model, examples, encoding, CPU)) == [(True, False), (False, True), (False, False)]


def test_the_interval_is_wilsons():
    share, (low, high) = grading.accuracy([True] * 3 + [False] * 7)
    z = 1.959963984540054  # half of 95 % of a normal distribution lies below it and above 0
    middle, half = (3 + z**2 / 2) / (10 + z**2), z / (10 + z**2) * (3 * 7 / 10 + z**2 / 4) ** 0.5
    assert (share, low, high) == (0.3, pytest.approx(middle - half), pytest.approx(middle + half))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line: Invalid JSON"),
        ("[]", "line: Input should be an object"),
        ("", "line: Invalid JSON"),
        (LINES[0].replace('"label": 0', '"label": 4'), "label: Input should be less than or equal to 3"),
        (LINES[0].replace('"label": 0', '"label": "0"'), "label: Input should be a valid integer"),
        (LINES[0].replace('"runs."', '"runs.", "sits."'), "endings: List should have at most 4 items"),
        (LINES[0].replace('"runs."', "null"), r"endings\.3: Input should be a valid string"),
        (LINES[0].replace("A boy fills a kettle with water. He", ""), "ctx: String should have at least 1 character"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line, message):
    (tmp_path / "val.jsonl").write_text(f"{LINES[1]}\n{line}\n")
    with pytest.raises(UserError, match=rf"val\.jsonl:2: not a HellaSwag example: {message}") as caught:
        grading.read(tmp_path / "val.jsonl")
    assert len(str(caught.value).splitlines()) == 1


def test_no_example_at_all_is_an_error(tmp_path):
    (tmp_path / "val.jsonl").touch()
    with pytest.raises(UserError, match="there is no example"):
        grading.read(tmp_path / "val.jsonl")


def test_an_example_that_is_too_long_for_the_network_is_named(encoding):
    example = grading.Example(ctx="so " * 40, endings=["a"] * 4, label=0)
    with pytest.raises(UserError, match="example 1 takes 41 positions; this network has n_positions 32"):
        list(grading.grade(GPT(tiny(vocab_size=50257)), [example], encoding, CPU))


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files, serve):
    """A folder with all that the command reads, a random stand-in in data/gpt2, and our questions at its address."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    write_json(ENVIRONMENT, environment().model_dump())
    link_encoding(bpe_files)
    size = params_yaml.load().models["tiny"].model_copy(update={"n_layer": 1, "n_embd": 16, "n_positions": 64})
    pretrained.fetch(Path("data/gpt2"), config.Pretrained(source="stand-in", folder=None), "tiny", size, seed=3)
    monkeypatch.setattr(command, "SHA256", hashlib.sha256(BODY).hexdigest())
    monkeypatch.setattr(command, "SOURCES", (command.Url(serve(body=BODY)),))


def test_the_command_counts_what_transformers_finds_right(checkout, serve, encoding, capsys):
    command.main()
    found = json.loads(Path("results/hellaswag.json").read_text())
    right = []
    for ctx, endings in QUESTIONS:
        ids = [encoding.encode_ordinary(" " + ending) for ending in endings]
        alone = [by_transformers(Path("data/gpt2"), encoding.encode_ordinary(ctx), ending) for ending in ids]
        scores = torch.tensor([[one.sum(), one.mean()] for one in alone])
        right.append((scores.argmax(0) == 0).tolist())
    assert [found["acc"], found["acc_norm"]] == torch.tensor(right).float().mean(0).tolist()
    assert (found["n"], found["of"]) == (4, 4)
    assert found["acc_interval"][0] <= found["acc"] <= found["acc_interval"][1]
    assert (found["model"], found["source"]) == ("data/gpt2", pretrained.STAND_IN_SOURCE)
    assert found["note"] == pretrained.STAND_IN_NOTICE
    assert "NOT verified: random stand-in" in capsys.readouterr().out
    command.main("--limit", "3")
    limited = json.loads(Path("results/hellaswag.json").read_text())
    assert (limited["n"], limited["of"]) == (3, 4)
    assert limited["acc"] == sum(whole for whole, _ in right[:3]) / 3
    assert len(serve.requests) == 1  # the questions stay


def test_weights_of_ones_own_are_not_called_openais_or_a_stand_in(checkout):
    written = downloads.read_provenance(Path("data/gpt2") / hub_format.WEIGHTS)
    assert written["source"] == pretrained.STAND_IN_SOURCE
    hub_format.save_gpt(GPT(tiny(vocab_size=50257)), Path("data/gpt2"))  # what lies beside them speaks of others now
    found = downloads.read_provenance(Path("data/gpt2") / hub_format.WEIGHTS)
    assert found["sha256"] != written["sha256"]
    assert (found["source"], found["note"]) == ("a local file; nothing beside it says where it comes from", None)


@pytest.mark.parametrize("name", [hub_format.CONFIG, hub_format.WEIGHTS])
def test_damaged_weights_are_refused_before_a_question_is_asked(checkout, serve, name):
    with (Path("data/gpt2") / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=rf"^data/gpt2/{name}: sha256 is .*; run `dvc repro -f download`$"):
        command.main()
    assert serve.requests == []


def test_other_questions_than_the_pinned_ones_are_refused(checkout, serve, monkeypatch, waits):
    monkeypatch.setattr(command, "SOURCES", (command.Url(serve(body=BODY.replace(b"eats", b"cats"))),))
    with pytest.raises(UserError, match=r"hellaswag_val\.jsonl: no source gave the file"):
        command.main()
    assert not command.QUESTIONS.exists()
    assert not Path("results/hellaswag.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit 0: at least one question"),
        (["nowhere"], "nowhere: not a readable checkpoint"),
        (["models/small"], r"models/small: vocab_size 97 is below GPT-2's 50257"),
    ],
)
def test_what_cannot_be_asked_is_one_line(checkout, serve, arguments, message):
    hub_format.save_gpt(GPT(tiny()), Path("models/small"))
    with pytest.raises(UserError, match=message):
        command.main(*arguments)
    assert serve.requests == []


def test_the_ladder_never_asks():
    assert "hellaswag" not in (REPOSITORY / "dvc.yaml").read_text()
