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

# Every command of the pages, without the variables before it and without -S (its values have their own test): by the
# test or helper, as file.function, that runs it with all its words, or by the reason why no test runs it.
RUN_BY = {
    "test_pipeline.test_a_second_run_executes_only_the_environment_stage": ["dvc repro"],
    "test_pipeline.test_a_retrained_level_updates_parity_and_report": ["dvc repro -f -s train@bf16"],
    "test_pipeline.test_a_new_download_repairs_dvcs_cache_and_retrains_nothing": ["dvc repro -f download"],
    "test_pipeline.test_an_experiment_runs_only_the_trial_and_can_be_removed": [
        "dvc exp run",
        "dvc exp remove --all-commits",
        "dvc gc --workspace --all-branches",
        "make show",
    ],
    "test_pipeline.test_a_command_that_shows_results_works_and_changes_no_file": [
        "dvc exp show --only-changed",
        "dvc metrics show",
        "make plan",
        "make plan MEMORY=24GiB",
        "make schema",
        'make sample PROMPT="Once upon a time"',
    ],
    "test_pipeline.test_an_edited_row_trains_only_its_level_and_its_results_can_be_committed": [
        "dvc commit trial",
        "dvc metrics diff",
        "dvc params diff",
        "git add params.yaml dvc.lock pipeline/environment-stage/dvc.lock results",
        'git commit -m "My machine"',
    ],
    "test_pipeline.test_your_own_keys_stay_out_of_git": ["dvc remote modify --local store profile NAME"],
    "test_pipeline.test_a_longer_benchmark_stays_until_something_changes": [
        "make benchmark",
        "make benchmark ROUNDS=100",
    ],
    "test_pipeline.test_the_page_with_dvcs_plots_loads_nothing_from_a_server": ["make plots"],
    "test_pipeline.test_the_shared_folder_has_the_trials_network_and_the_facts_of_its_run": [
        "make share FOLDER=../my-gpt2"
    ],
    "climbing.get_back": ["dvc checkout", "git restore params.yaml dvc.lock results"],
    "test_experiments.test_keep_going_runs_the_other_levels_when_one_fails": ["dvc repro -k"],
    "test_experiments.test_two_queue_workers_run_the_queued_code_and_keep_the_shared_cache_whole": [
        "dvc exp run --queue",
        "dvc queue start",
        "dvc queue start -j 2",
        "dvc queue status",
    ],
    "test_repository.test_an_experiment_in_a_copy_warns_about_the_real_repository": ["dvc exp run --temp"],
    "test_team.team": ["dvc remote add --default store /a/folder/all/see", "dvc push", "git clone"],
    "test_team.test_a_fresh_clone_trains_nothing_after_dvc_pull": ["dvc pull"],
    "test_team.test_an_experiment_is_shared_without_training_it_twice": [
        "dvc exp push origin NAME",
        "dvc exp pull origin NAME",
        "dvc exp apply NAME",
    ],
    "test_tools.test_two_levels_or_two_machines_are_compared": [
        "python -m pipeline.tools.compare padded bf16",
        "python -m pipeline.tools.compare experiments/runs/xeon-amx.json",
    ],
}
NOT_RUN = {
    "a Git command without options of ours": ["git push", "git pull"],
    "needs a network": [
        "make hellaswag LIMIT=500",
        "make pins",
        "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu",
        "apt install python3-dev python3-venv git make g++",
        "pip install dvc-s3",
        "rm -rf .venv",
        ".venv/bin/pip check",
    ],
    "takes 20 minutes; the climb of the tests runs its `dvc repro`": ["make repro"],
    "runs these tests, or is the other half of .ci/run": ["make test", "make check"],
    "needs a GPU; test_gpu.py rehearses it": ["make test-gpu"],
    "names a process; test_ranks.py sends it a SIGTERM": ["python -m pipeline.train"],
    "takes minutes": [
        "python -m pytest -m long -n 0",
        "python experiments/memory.py",
        "python experiments/determinism.py",
        "python experiments/overheads.py",
        "python experiments/race.py",
        "python experiments/scaling.py",
        "python experiments/tokenizing.py",
        "python experiments/reliability.py",
    ],
    "a column's title; the tests below it are part of the suite": ["python -m pytest -n 0"],
    "needs two machines; test_ranks.py starts two ranks on one": [
        "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id ladder "
        "--rdzv-endpoint HOST:29400 -m pipeline.trial"
    ],
    "adds a folder of your own": ["dvc add corpus"],
    "needs a terminal; test_tracking.py reads runs with its `inspect`": ["wandb leet wandb"],
    "needs an account": ["wandb login"],
    "described as not working": ["wandb offline"],
    "run by the last test of this file": ["grep -cwE '(avx512_|amx_)?bf16' /proc/cpuinfo"],
    "changes your shell": ["source .venv/bin/activate", "export USER=$(id -u)"],
    "test_repository.py runs them as the warnings print them": [
        "git fetch --unshallow",
        "git switch main",
        "git config user.name NAME",
        "git config user.email EMAIL",
    ],
}
LISTED = [command for rows in (RUN_BY, NOT_RUN) for commands in rows.values() for command in commands]


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


def words_run_by(test: str) -> list[list[str]]:
    """Return the words of the commands in a function of tests/: of each call's arguments, and of each string."""
    file, _, name = test.partition(".")
    (path,) = (REPOSITORY / "tests").rglob(f"{file}.py")
    tree = ast.parse(path.read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    result = []
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count('"') != 1:
            result.append(shlex.split(node.value.replace("'", "")))
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
    """Tell whether all words of `command` follow each other in `words`."""
    documented = shlex.split(command)
    starts = range(len(words) - len(documented) + 1)
    return any(all(map(stands_for, documented, words[start : start + len(documented)])) for start in starts)


def test_every_command_of_a_page_is_listed_here_once():
    assert sorted(commands()) == sorted(LISTED), "list each command of a page in RUN_BY or NOT_RUN, and no other"


@pytest.mark.parametrize("test", RUN_BY)
def test_a_listed_command_is_run_with_all_its_words(test):
    runs = words_run_by(test)
    assert [command for command in RUN_BY[test] if not any(is_run(command, words) for words in runs)] == []


@pytest.mark.parametrize("command", [command for command in LISTED if command.startswith("make ")])
def test_every_make_target_exists(command):
    dry = [*shlex.split(command), "--dry-run", "--old-file", ".venv/installed"]
    assert subprocess.run(dry, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_every_script_and_test_file_that_a_page_names_exists():
    paths = {
        word for page in PAGES for span in spans(page) for word in span.split() if re.match(r"[\w./]+/\w+\.py$", word)
    }
    assert len(paths) > 10
    assert [path for path in paths if not ((REPOSITORY / path).exists() or (REPOSITORY / "src" / path).exists())] == []


def changes() -> list[str]:
    """Return the values of every -S option, and every `key=value` of the README's tables with a GPU's shape."""
    loose = [span for span in spans(REPOSITORY / "README.md") if re.fullmatch(r"[a-z_.]+=[\w.]+", span)]
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


def test_every_relative_link_and_picture_exists():
    pages, count = [*PAGES, *REPOSITORY.glob("results/**/*.md")], 0
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page.relative_to(REPOSITORY)}: {link}"
                count += 1
    assert count > 40


def test_the_readmes_check_for_bfloat16_agrees_with_the_environment_stage():
    command = next(command for command in commands() if command.startswith("grep"))
    count = subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
    assert (int(count) > 0) == environment.describe().bf16
