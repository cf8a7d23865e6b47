"""The command that checks a user's own GPT: its page, its exit code, and one line for every bad input."""

import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil
import pytest

from gpt2_ladder import params_yaml
from gpt2_ladder.checking.behaviour import CHECKS
from gpt2_ladder.config import UserError
from helpers import own_gpts
from helpers.common import REPOSITORY
from helpers.processes import IMPORTABLE
from pipeline.tools import check

SMALL = ("--config", "vocab_size=300", "--rounds", "0")
FILE = """
import os, sys, time
import torch
from torch import nn

class GPT(nn.Module):
    def __init__(self, vocab_size, n_embd{arguments}):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        {first}
        return self.head(self.wte(idx))
"""
TYPE_ERROR = "TypeError: GPT.__init__() missing 1 required positional argument: 'tokenizer'"
SAVE_PID = 'open("pid", "w").write(str(os.getpid()));'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with params.yaml."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def imported() -> Iterator[BaseContext]:
    """A context whose processes start with torch imported, which takes the command's own processes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt2_ladder.checking.verdict", "pipeline.tools.check"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", IMPORTABLE)
        yield context


@pytest.fixture
def refused(folder, monkeypatch, imported) -> Callable[..., str]:
    """A function that checks a source which cannot be checked, and returns the error, which is one line."""
    monkeypatch.setattr(check, "get_context", lambda method: imported)

    def refused(source: str | None = None, *options: str) -> str:
        if source is not None:
            (folder / "my_gpt.py").write_text(source)
        with pytest.raises(UserError) as caught:
            check.main("my_gpt.py:GPT", "--rounds", "0", *options)
        assert not (folder / "mine").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        check.main(*arguments)
    return caught.value.code


@pytest.mark.slow
def test_a_right_network_that_prints_much_gets_a_page_and_exit_code_0(folder, capfd):
    noise = 'print("noise " * 100_000, flush=True)\n'
    loud = {"        B, T, C = x.size()\n": f"        {noise}        B, T, C = x.size()\n"}
    (folder / "my&gpt.py").write_text(f"import sys\n{own_gpts.replaced('video', loud)}")
    assert code_of("my&gpt.py:GPT", *SMALL) == 0
    out, err = capfd.readouterr()
    assert "noise" not in out + err
    assert out.startswith("Checking my&gpt.py:GPT, for at most 300 s ...\nYour network is GPT-2.\n")
    assert out.endswith("\nThe page: mine/report.html\n")
    html = (folder / "mine" / "report.html").read_text()
    assert f"<code>python -m pipeline.tools.check my&amp;gpt.py:GPT {' '.join(SMALL)}</code>" in html
    assert '<p class="answer">Your network is GPT-2.</p>' in html
    assert "<h1>my&amp;gpt.py:GPT</h1>" in html
    checks = CHECKS.keys() - {"loss curve"}  # only a race has it
    assert {*re.findall(r'<td><a href="\.\./docs/\S+">(.*?)</a>', html)} == checks
    assert {*re.findall(r"^\| ([\w ]*?) *\| (?:pass|variant)", out, re.MULTILINE)} == checks
    assert "Speed" not in html


@pytest.mark.slow
def test_a_fault_gives_a_page_with_its_name_and_exit_code_1(folder, monkeypatch, imported, capsys):
    monkeypatch.setattr(check, "get_context", lambda method: imported)
    (folder / "my_gpt.py").write_text(own_gpts.sources("video")["scores_unscaled"])
    assert code_of("my_gpt.py:GPT", "--config", "vocab_size=300", "--rounds", "5", "--precision", "bf16") == 1
    sentence = "Your attention is not scaled: its scores are not divided by sqrt(D): in layer 0 c_attn's output agrees"
    assert capsys.readouterr().out.splitlines()[1].startswith(sentence)
    html = (folder / "mine" / "report.html").read_text()
    assert '<p class="answer fault">Your attention is not scaled' in html
    assert re.search(
        r"<strong>Speed:</strong> your training step is \d\.\d\d \[.*\] times as fast as ours .*, bf16\)\.", html
    )


@pytest.mark.slow
def test_what_cannot_be_loaded_built_or_called_is_one_line(refused):
    assert refused() == "my_gpt.py:GPT: cannot be read: [Errno 2] No such file or directory: 'my_gpt.py'"
    assert refused("class GPT(:\n") == "my_gpt.py:GPT: cannot be read: invalid syntax (my_gpt.py, line 1)"
    assert refused(FILE.format(arguments=", tokenizer", first="")) == (
        f"my_gpt.py:GPT: {TYPE_ERROR}; --config key=value sets what its config lacks"
    )
    source = FILE.format(arguments="", first="").replace("forward(self, idx)", "forward(self, idx, mask)")
    assert refused(source).endswith("forward() missing 1 required positional argument: 'mask'")  # no word of --config
    source = FILE.format(arguments="", first="return self.wte(idx).sum()")
    assert refused(source).endswith("forward returns () for ids (4, 32); logits are (B, T, V)")
    source = FILE.format(arguments="", first='raise ValueError("two\\nlines")')
    assert "ValueError in line 13: two lines" in refused(source)
    assert refused(source, "--config", "heads=3") == ("my_gpt.py:GPT: --config heads: GPT only has n_embd, vocab_size")


@pytest.mark.slow
def test_a_network_that_hangs_is_killed(refused, folder):
    source = FILE.format(arguments="", first=f"{SAVE_PID} time.sleep(60)")
    assert refused(source, "--seconds", "15") == (
        "my_gpt.py:GPT: no result after 15 s; if it does not hang, raise --seconds"
    )
    pid, deadline = int((folder / "pid").read_text()), time.monotonic() + 5
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline


@pytest.mark.slow
def test_a_network_that_ends_its_process_or_needs_too_much_memory_is_one_line(refused):
    for call, code in (("os._exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9)):
        error = refused(FILE.format(arguments="", first=call))
        assert error == f"my_gpt.py:GPT: its process ended with exit code {code}"
    error = refused(FILE.format(arguments="", first="torch.empty(2**30)"), "--memory", "3")  # 4 GiB
    assert re.match(r"my_gpt.py:GPT: RuntimeError in line 13: .*; raise --memory$", error)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--config", "vocab_size"), "--config vocab_size: give key=value"),
        (("--config", "vocab_size=300", "n_layer="), "--config n_layer=: give key=value"),
        (("--size", "big"), "argument --size: invalid choice: 'big'"),
        (("--rounds", "few"), "argument --rounds: invalid int value: 'few'"),
        (("--rounds", "1"), "--rounds 1: give 0 for no race, or 2 and more"),
        (("--rounds", "-1"), "--rounds -1: give 0 for no race, or 2 and more"),
        (("--precision", "fp8"), "argument --precision: invalid choice: 'fp8'"),
        (("--compiled",), "unrecognized arguments: --compiled"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_options_are_refused_before_anything_runs(arguments, shown, folder):
    with pytest.raises(UserError) as caught:
        check.main("my_gpt.py:GPT", *arguments)
    assert str(caught.value).startswith(shown)
    assert "\n" not in str(caught.value)


def test_values_of_the_config_are_constants_or_texts(folder):
    pairs = ("n_layer=3", "bias=False", "name=gpt", "rate=1e-1", "sizes=[1, 2]", "path=a=b", "none=None")
    args = check.parse(("transformers:GPT2LMHeadModel", "--config", *pairs, "--compile"), params_yaml.load())
    assert args.config == {
        **{"n_layer": 3, "bias": False, "name": "gpt", "rate": 0.1},
        **{"sizes": [1, 2], "path": "a=b", "none": None},
    }
    assert (args.size, args.precision, args.compile, args.rounds) == ("tiny", "fp32", True, 12)


def test_every_check_has_a_reason_and_a_row_of_the_page():
    page = (REPOSITORY / "docs" / "check.md").read_text()
    for name, reason in CHECKS.items():
        assert len(reason) < 90
        assert name in {"function", "loss curve"} or f"| {name} | " in page
