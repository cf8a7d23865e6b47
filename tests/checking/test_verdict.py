"""The sentence and the exit code of a check, for every planted fault, every variant and the right networks."""

import math
import re

import pytest

from experiments.checking import NAMED
from gpt2_ladder.checking import behaviour, verdict
from gpt2_ladder.checking.behaviour import FAIL, PASS, UNKNOWN, VARIANT, Finding
from gpt2_ladder.checking.verdict import Report, conclude
from gpt2_ladder.config import UserError
from helpers import own_gpts
from helpers.common import environment, params_with

FAULTS = [fault for fault in own_gpts.sources("video") if fault != "right" and not fault.startswith("variant: ")]
WORDS = {  # of the sentence for a fault that does not change the function
    "init_default": "init)",
    "init_unscaled": "has a fault (residual stream at init)",
    "block_detached": "(gradients): none for 1",
    "dropout_always": "(dropout): in eval mode, one input gives two results",
    "loss_shifted": "has a fault (loss): the targets are shifted by one more token",
    "loss_ignores": "has a fault (loss): targets with id 0 are ignored",
}
UNTIED = "the head is not tied to the embedding"
VARIANTS = {  # the reasons in the sentence
    "exact_gelu": ["its GELU is exact instead of tanh (nanoGPT's choice)"],
    "no_biases": ["linear layers have no biases", "LayerNorms have no biases"],
    "padded": ["the vocabulary is padded to 320"],
    "untied": [UNTIED],
    "tied": [],
}
ATTENTION = "F.scaled_dot_product_attention(q, k, v, is_causal=True)"
RATIO = r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]"


@pytest.fixture
def check(write_gpt):
    """A function that checks a source of an implementation with a small vocabulary, without a race."""

    def check(name: str, source: str, rounds: int = 0, vocab_size: int = 300) -> Report:
        path, settings = write_gpt(source), own_gpts.options(name, vocab_size)
        params = params_with(model="tiny")
        return verdict.check(
            f"{path}:{own_gpts.CLASSES[name]}", settings, params, environment(threads=1), rounds=rounds
        )

    return check


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["video", "paper"])
def test_every_planted_fault_is_found_and_named(name, fault, check):
    report = check(name, own_gpts.sources(name)[fault])
    assert report.code == 1
    assert {**NAMED, **WORDS}[fault] in report.sentence
    assert "\n" not in report.sentence


def test_every_fault_that_changes_the_function_has_its_words():
    assert NAMED.keys() | WORDS.keys() == {*FAULTS}
    assert len(FAULTS) == 24


@pytest.mark.parametrize("name", own_gpts.CLASSES)
def test_right_networks_and_their_variants_are_gpt2(name, check):
    sources = {"right": [], **{f"variant: {variant}": reasons for variant, reasons in VARIANTS.items()}}
    sources = {source: reasons for source, reasons in sources.items() if source in own_gpts.sources(name)}
    assert len(sources) == 5
    for source, reasons in sources.items():
        report = check(name, own_gpts.sources(name)[source])
        choices = [UNTIED] if name == "mingpt" and source != "variant: tied" else []
        start, _, shown = report.sentence.rstrip(".").partition(", but ")
        assert (report.code, start, {*shown.split(", ")} - {""}) == (0, "Your network is GPT-2", {*reasons, *choices})


def test_transformers_own_network_is_gpt2(check):
    params = params_with(model="tiny")
    name, settings = "transformers:GPT2LMHeadModel", own_gpts.options("hub")
    report = verdict.check(name, settings, params, environment(threads=1), rounds=0)
    assert (report.code, report.sentence, report.name) == (0, "Your network is GPT-2.", name)


def test_a_right_network_is_raced_and_its_loss_curve_compared(check):
    report = check("video", own_gpts.sources("video")["right"], rounds=5, vocab_size=65)
    assert report.code == 0
    speed = rf"{RATIO} times as fast as ours \(control {RATIO}, 5 rounds, fp32\)"
    assert re.fullmatch(speed, report.speed)
    assert report.sentence == f"Your network is GPT-2, and its step is {report.speed}."
    (curve,) = [each for each in report.findings if each.check == "loss curve"]
    assert curve.verdict == PASS


def test_a_network_with_another_function_is_raced_without_a_loss_curve(check):
    source = own_gpts.replaced("video", {'nn.GELU(approximate="tanh")': "nn.LeakyReLU()"})
    report = check("video", source, rounds=5)
    assert report.code == 1
    assert "(function): in layer 0 c_fc's output agrees and the activation's result differs; logits differ by" in (
        report.sentence
    )
    assert report.sentence.endswith("no known cause explains it.")
    assert "times as fast as ours" in report.speed
    assert "loss curve" not in [each.check for each in report.findings]


@pytest.mark.parametrize(
    ("step", "added", "shown"), [(1, 0.01, "at most 1.0e-02 nats"), (2, math.nan, "at most nan nats")]
)
def test_a_loss_curve_off_by_more_than_parity_allows_fails(step, added, shown, check, monkeypatch):
    right, take, steps = own_gpts.sources("video")["right"], verdict.turns.Arm.take, list[int]()

    def off(arm, *arguments, **named):
        loss = take(arm, *arguments, **named)
        if arm.name == verdict.OURS or not isinstance(loss, tuple):
            return loss
        steps.append(len(steps) + 1)
        return (loss[0] + added, loss[1]) if steps[-1] == step else loss

    monkeypatch.setattr(verdict.turns.Arm, "take", off)
    report = check("video", right, rounds=5)
    assert (report.code, f"has a fault (loss curve): {shown}" in report.sentence) == (1, True)


def test_a_network_with_the_parameters_of_a_gpt2_in_other_shapes_cannot_be_told(check):
    changes = {
        "nn.Embedding(context, width)": "nn.Parameter(torch.zeros(1, context, width))",
        "self.position_embedding(positions)": "self.position_embedding[:, : tokens.shape[1]]",
    }
    report = check("paper", own_gpts.replaced("paper", changes))
    assert report.code == 2
    assert report.sentence == (
        "Cannot tell whether your network is GPT-2: its weights do not match GPT-2's by shape and order. "
        "The other checks found no fault."
    )


def test_an_embedding_with_a_head_is_not_gpt2_and_its_function_cannot_be_told(check):
    source = (
        "from torch import nn\n\nclass GPT(nn.Module):\n    def __init__(self, vocab_size, n_embd):\n"
        "        super().__init__()\n        self.wte = nn.Embedding(vocab_size, n_embd)\n"
        "        self.head = nn.Linear(n_embd, vocab_size)\n"
        "    def forward(self, idx):\n        return self.head(self.wte(idx))\n"
    )
    report = check("video", source)
    verdicts = {each.check: each.verdict for each in report.findings}
    assert report.code == 1
    assert verdicts["function"] == verdicts["residual stream at init"] == UNKNOWN
    assert "(parameters): -85,6" in report.sentence


def test_a_network_with_another_matrix_in_its_blocks_is_not_compared(check):
    changes = {
        "self.activation = GELU()\n": "self.activation = GELU()\n        self.gate = nn.Linear(width, 4 * width)\n",
        "self.activation(self.expand(x))": "self.activation(self.expand(x)) * self.gate(x)",
    }
    report = check("paper", own_gpts.replaced("paper", changes))
    assert (report.code, report.findings[-1].verdict) == (1, UNKNOWN)
    assert "(parameters): +28,348,416 parameters are not explained" in report.sentence


def test_what_forward_cannot_take_is_an_error(check):
    with pytest.raises(UserError, match=r"forward returns \(4, 32, 64\), \(\) for ids|forward returns no tensor"):
        check("video", own_gpts.replaced("video", {"return logits, loss": "return None"}))


def test_a_network_without_biases_is_raced_without_a_loss_curve(check):
    report = check("video", own_gpts.sources("video")["variant: no_biases"], rounds=5)
    assert (report.code, [each.check for each in report.findings][-1]) == (0, "function")
    assert report.speed


@pytest.mark.parametrize("name", ["video", "mingpt"])  # tied and not
def test_a_head_with_a_bias_is_a_variant(name, check):
    old = "config.vocab_size, bias=False)"
    report = check(name, own_gpts.replaced(name, {old: "config.vocab_size)"}))
    assert (report.code, "the head has a bias" in report.sentence) == (0, True)


def test_attention_that_sees_only_a_part_of_a_long_text_is_found(check):
    window = "F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(T, T, dtype=torch.bool).tril().triu(-300))"
    report = check("video", own_gpts.replaced("video", {ATTENTION: window}))
    assert report.code == 1
    assert re.search(r"for 32 tokens the same .*, but for 1023 tokens logits differ by", report.sentence)


def test_a_network_that_ignores_its_number_of_heads_is_found(check):
    report = check("video", own_gpts.replaced("video", {"self.n_head = config.n_head": "self.n_head = 1"}))
    assert (report.code, "attention's result differs" in report.sentence) == (1, True)


def test_a_fault_of_a_network_with_exact_gelu_is_named(check):
    source = own_gpts.replaced("video", {ATTENTION: ATTENTION.replace("is_causal=True", "is_causal=False")})
    tanh = 'nn.GELU(approximate="tanh")'
    assert tanh in source
    report = check("video", source.replace(tanh, "nn.GELU()"))
    assert report.sentence.startswith("Your attention has no causal mask")


def test_wrong_gradients_of_a_variant_are_a_fault_of_its_function(check):
    source, tanh = own_gpts.sources("video")["block_detached"], 'nn.GELU(approximate="tanh")'
    assert tanh in source
    report = check("video", source.replace(tanh, "nn.GELU()"))
    (function,) = [each for each in report.findings if each.check == "function"]
    assert (function.verdict, function.reason) == (FAIL, "")
    assert re.search(r"the same logits \(\de-\d\d apart\) but other gradients \(1e\+00 apart, ", function.result)
    assert report.sentence.startswith("Your network is not GPT-2 (gradients): none for 13 of 28 parameters")
    assert "differs: its GELU is exact instead of tanh (nanoGPT's choice); with this change, ours" in function.result


def test_losses_are_not_compared_if_dropout_cannot_be_set_to_0(check):
    source = own_gpts.replaced(
        "video", {"return self.c_proj(y)": "return F.dropout(self.c_proj(y), 0.1, self.training)"}
    )
    report = check("video", source, rounds=5)
    assert (report.code, [each.check for each in report.findings][-1]) == (0, "function")
    assert "GPT-2, but its dropout has a rate in forward, so losses in train mode are not compared" in report.sentence
    (dropout,) = [each for each in report.findings if each.check == "dropout"]
    assert (dropout.verdict, dropout.result) == (VARIANT, "on in train mode")


def test_a_loss_that_autocast_computes_in_bfloat16_is_named(check):
    report = check("paper", own_gpts.replaced("paper", {"log_softmax(logits.float()": "log_softmax(logits"}))
    assert (report.code, "autocast computes its loss in bfloat16" in report.sentence) == (0, True)


def test_a_network_that_returns_only_the_loss_with_targets_is_checked(check):
    report = check(
        "video", own_gpts.replaced("video", {"return logits, loss": "return logits if loss is None else loss"})
    )
    assert (report.code, report.sentence) == (0, "Your network is GPT-2.")


@pytest.mark.parametrize("width", [240, 192])  # 4 * 192 is GPT-2's width
def test_the_width_of_a_network_that_cannot_be_set_is_not_a_fault(check, width):
    fixed = {"self.config = config\n": f"config.n_embd = {width}\n        self.config = config\n"}
    report = check("video", own_gpts.replaced("video", fixed))
    verdicts = {each.check: each.verdict for each in report.findings}
    assert (report.code, verdicts["parameters"], verdicts["function"]) == (0, UNKNOWN, PASS)


def test_a_network_of_fixed_size_learns_with_gpt2s_rate(check, monkeypatch):
    rates, check_behaviour = [], behaviour.check_behaviour
    monkeypatch.setattr(behaviour, "check_behaviour", lambda *args: rates.append(args[-1]) or check_behaviour(*args))
    start = "self.config = config\n"
    for source in (start, f"config.n_embd = 240\n        {start}"):
        check("video", own_gpts.replaced("video", {start: source}))
    assert rates == [5e-3, 3e-4]  # tiny's and gpt2's in params.yaml


def test_the_race_trains_with_gpt2s_rate_for_which_the_tolerance_was_measured(check, monkeypatch):
    rates, race = [], verdict.race
    monkeypatch.setattr(verdict, "race", lambda arms, *rest: rates.extend(lr_of(arms)) or race(arms, *rest))

    def lr_of(arms):
        return [arm.optimizer.param_groups[0]["lr"] for arm in arms]

    check("video", own_gpts.sources("video")["right"], rounds=5)
    assert rates == [3e-4, 3e-4]


RIGHT = Finding("function", PASS, "logits within 1e-7")
CAUSE = Finding("function", FAIL, "in layer 0", "Your attention is not scaled")
DIFFERENT = Finding("function", FAIL, "in layer 0 all differs")
UNMATCHED = Finding("function", UNKNOWN, "no weights match")
ROWS = Finding("rows", FAIL, "1e-2")
MORE = Finding("parameters", VARIANT, "38,597,376", "the vocabulary is padded")
DROPOUT = Finding("dropout", VARIANT, "on in train mode")


@pytest.mark.parametrize(
    ("findings", "speed", "code", "sentence"),
    [
        ([RIGHT], "", 0, "Your network is GPT-2."),
        ([RIGHT, DROPOUT], "2x", 0, "Your network is GPT-2, and its step is 2x."),
        ([MORE, RIGHT], "2x", 0, "Your network is GPT-2, but the vocabulary is padded, and its step is 2x."),
        ([ROWS, CAUSE], "2x", 1, "Your attention is not scaled: in layer 0."),
        ([ROWS, MORE, RIGHT], "2x", 1, "Your network computes GPT-2, but has a fault (rows): 1e-2."),
        (
            [Finding("overfit", FAIL, "2 nats"), ROWS, RIGHT],
            "",
            1,
            "Your network computes GPT-2, but has a fault (rows): 1e-2.",
        ),
        ([ROWS, DIFFERENT], "", 1, "Your network is not GPT-2 (rows): 1e-2."),
        ([DIFFERENT], "", 1, "Your network is not GPT-2 (function): in layer 0 all differs."),
        ([ROWS, UNMATCHED], "", 1, "Your network has a fault (rows): 1e-2."),
        (
            [MORE, UNMATCHED],
            "2x",
            2,
            "Cannot tell whether your network is GPT-2: no weights match. The other checks found no fault.",
        ),
    ],
)
def test_the_sentence_has_the_cause_before_other_faults_and_these_before_variants(findings, speed, code, sentence):
    assert conclude("my_gpt.py:GPT", findings, speed) == Report("my_gpt.py:GPT", sentence, findings, speed, code)
