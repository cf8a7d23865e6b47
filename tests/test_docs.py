"""The commands, -S values, links and file names in README.md, CONTRIBUTING.md and docs/ are right.

docs/LOG.md is a record of what was run at the time, so only its links are checked.
"""

import ast
import re
import shlex
import shutil
import subprocess

import pytest
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

from gpt2_ladder import params_yaml
from helpers.common import REPOSITORY
from pipeline import environment

PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(REPOSITORY.glob("docs/**/*.md"))]
PROGRAMS = {"dvc", "make", "python", "wandb", "git", "torchrun", "pip", "apt", "source", "export", "grep", "rm"}

# The commands that no test runs, without the variables before them and without -S (its values have their own test).
NOT_RUN = {
    "a Git command without options of ours": "git push; git pull",
    "needs a network": "make hellaswag LIMIT=500; make pins; apt install python3-dev python3-venv git make g++; "
    "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; pip install dvc-s3; "
    "rm -rf .venv; .venv/bin/pip check",
    "takes 20 minutes; the climb of the tests runs its `dvc repro`": "make repro",
    "needs a GPU; test_gpu_plan.py runs it with fake commands": "make gpu MINUTES=20",
    "runs the tests, or is the other half of .ci/run": "make test-fast; make check",
    "test_gallery.py compares what it writes with the pages": "make docs",
    "needs a GPU; test_gpu.py rehearses it": "make test-gpu",
    "needs a GPU; test_batch_curve.py measures the tiny model": "python experiments/scaling.py --batch-curve",
    "names a process; test_ranks.py sends it a SIGTERM": "python -m pipeline.train",
    "takes minutes": "python -m pytest -m long -n 0; python experiments/memory.py; python experiments/determinism.py; "
    "python experiments/overheads.py; python experiments/race.py; "
    "python experiments/scaling.py; python experiments/tokenizing.py; python experiments/reliability.py; "
    "python -m experiments.replication run xeon-amx-tiny --processes 10; python -m experiments.replication write; "
    "python -m experiments.replication run xeon-amx-gpt2 --processes 10 --levels fp32 bf16 flash fused; "
    "python -m experiments.power faults; python -m experiments.power right; python -m experiments.power right-fp32; "
    "python -m experiments.power write; python -m experiments.checking",
    "test_check.py runs its command": "make check-mine MINE=my_gpt.py:GPT; "
    "python -m pipeline.tools.check transformers:GPT2LMHeadModel --precision bf16 --compile",
    "test_commands.py tests how make passes the number on": "make benchmark ROUNDS=100",
    "a column's title; the tests below it are part of the suite": "python -m pytest -n 0",
    "needs two machines; test_ranks.py starts two ranks on one": "torchrun --nnodes 2 --nproc-per-node 8 "
    "--max-restarts 3 --rdzv-backend c10d --rdzv-id ladder --rdzv-endpoint HOST:29400 -m pipeline.trial",
    "adds a folder of your own": "dvc add corpus",
    "needs a terminal; test_tracking.py reads runs with its `inspect`": "wandb leet wandb",
    "needs an account": "wandb login",
    "needs a key; test_wandb_server.py runs it with a server of its own": "python experiments/wandb_chart.py",
    "described as not working": "wandb offline",
    "run by the last test of this file": "grep -cwE '(avx512_|amx_)?bf16' /proc/cpuinfo",
    "changes your shell": "export USER=$(id -u)",
    "test_repository.py runs them as the warnings print them": "git fetch --unshallow; git switch main; "
    "git config user.name NAME; git config user.email EMAIL",
}


def spans(page) -> list[str]:
    """Return the lines of a page's code fences and its inline code, but no source code."""
    text = page.read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [line for kind, body in fence.findall(text) if not kind for line in body.replace("\\\n", "").splitlines()]
    return [line.split(" #")[0] for line in lines] + re.findall(r"`([^`]+)`", fence.sub("", text))


def commands() -> dict[str, list[str]]:
    """Return every command of the pages, and the values that its -S options set."""
    result: dict[str, list[str]] = {}
    for page in (page for page in PAGES if page.name != "LOG.md"):
        for text in (part for span in spans(page) for part in re.split(r"&&|;", span)):
            words = re.sub(r"^(\w+=\S+ )+", "", " ".join(text.split())).split()
            if len(words) > 1 and words[0].removeprefix(".venv/bin/") in PROGRAMS:
                values = re.findall(r"-S '?([^ ']+)'?", text)
                result.setdefault(re.sub(r" -S \S+", "", " ".join(words)), []).extend(
                    [" ".join(values)] if values else []
                )
    return result


def words_of_calls() -> list[list[str]]:
    """Return the words of the commands that the tests of stages run: each call's arguments, and each string."""
    paths = [*(REPOSITORY / "tests/stages").glob("*.py"), REPOSITORY / "tests/helpers/climbing.py"]
    result = []
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Constant) and re.match(r"(yes \| )?(dvc|git|make) ", str(node.value)):
            result.append(shlex.split(node.value))
        elif isinstance(node, ast.Call):
            strings = [n.value for a in node.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
            module = ast.unparse(node.func).removesuffix(".main")
            result.append(["python", "-m", f"pipeline.tools.{module}", *map(str, strings)])
    return result


def stands_for(documented: str, word: str) -> bool:
    """Tell whether a word of a page is `word` of a test; NAME and /a/path stand for any, X=value for any value of X."""
    key = re.match("[A-Z]+=", documented)
    return (
        word == documented
        or re.fullmatch("[A-Z]+|/.*", documented) is not None
        or (key is not None and word.startswith(key.group()))
    )


def is_run(command: str, words: list[str]) -> bool:
    """Tell whether `words` contain all words of `command`, and then at most options, X=value, && or /path."""
    documented = shlex.split(command)
    starts = range(len(words) - len(documented) + 1)
    return any(
        all(map(stands_for, documented, words[start : start + len(documented)]))
        and re.match("-|&&|/|[A-Z]+=|$", [*words, ""][start + len(documented)]) is not None
        for start in starts
    )


def test_tests_run_every_command_of_a_page_with_all_its_words():
    calls = words_of_calls()
    not_run = {command for command in commands() if not any(is_run(command, words) for words in calls)}
    listed = [command for text in NOT_RUN.values() for command in text.split("; ")]
    assert sorted(not_run) == sorted(listed), "let a test run this command, or give in NOT_RUN the reason why not"


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_every_make_target_exists(command):
    dry = [*shlex.split(command), "--dry-run", "--old-file", ".venv/installed"]
    assert subprocess.run(dry, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_every_script_and_test_file_that_a_page_names_exists():
    paths = {
        word for page in PAGES for span in spans(page) for word in span.split() if re.match(r"[\w./]+/\w+\.py$", word)
    }
    assert len(paths) > 10
    roots = [REPOSITORY / folder for folder in ("", "src", "src/gpt2_ladder")]
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


def changes() -> list[str]:
    """Return the values of every -S option, and every `key=value` of two pages with a GPU's shape."""
    pages = [REPOSITORY / name for name in ("README.md", "docs/usage.md")]
    loose = [span for page in pages for span in spans(page) if re.fullmatch(r"[a-z_.]+=[\w.]+", span)]
    return sorted(
        {text for values in commands().values() for text in values} | {f"machine=gpu {text}" for text in loose}
    )


@pytest.mark.parametrize("values", changes())
def test_params_yaml_accepts_every_change_that_a_page_makes(values, tmp_path):
    path = tmp_path / "params.yaml"
    for sweep in get_hydra_sweeps({str(path): values.split()}):
        shutil.copy(REPOSITORY / "params.yaml", path)
        apply_overrides(path, sweep[str(path)])  # as DVC does
        params_yaml.load(path)


def test_pages_are_short():
    readme = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(readme) <= 100
    assert [line for line in readme if len(line) > 120] == []
    docs = {
        page.relative_to(REPOSITORY): len(page.read_text().splitlines()) for page in PAGES if page.parent.name == "docs"
    }
    assert {page: lines for page, lines in docs.items() if lines >= 150} == {}


def test_the_readmes_diff_is_a_row_of_params_yaml_and_code_of_the_network():
    (diff,) = re.findall(r"```diff\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line[1:].strip() for line in diff.splitlines() if not line.startswith("@@")]
    files = [(REPOSITORY / name).read_text() for name in ("params.yaml", "src/gpt2_ladder/model.py")]
    assert set(lines) <= {line.strip() for text in files for line in text.splitlines()}


def anchors(page) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings, and those that the page sets itself."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_every_link_to_a_part_of_a_page_finds_it():
    links = {(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s:]*#[^)\s]+)\)", page.read_text())}
    assert len(links) > 5
    for page, link in links:
        name, _, anchor = link.partition("#")
        assert anchor in anchors(page.parent / name if name else page), f"{page.relative_to(REPOSITORY)}: {link}"


def test_every_relative_link_and_picture_exists():
    pages, count = [*PAGES, *REPOSITORY.glob("results/**/*.md")], 0
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page.relative_to(REPOSITORY)}: {link}"
                count += 1
    assert count > 40


def test_the_documented_check_for_bfloat16_agrees_with_the_environment_stage():
    command = next(command for command in commands() if command.startswith("grep"))
    count = subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
    assert (int(count) > 0) == environment.describe().bf16
