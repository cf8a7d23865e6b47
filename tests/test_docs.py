"""Nothing in README.md, CONTRIBUTING.md and docs/ is only written: commands, -S values, links and pictures are checked.

docs/LOG.md is a record: what it names was run then, and need not run now; its links are checked all the same.
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

# Every command, by the test (file and name) that executes it or by the reason why none does. Without the variables set
# before it, and without -S, whose values have a test of their own.
HELD = {
    "test_pipeline.test_a_second_run_runs_nothing_but_the_environment": ["dvc repro"],
    "test_experiments.test_a_failing_level_does_not_stop_the_others_when_asked_to_keep_going": ["dvc repro -k"],
    "test_pipeline.test_one_level_is_trained_again_and_the_table_follows": ["dvc repro -f -s train@bf16"],
    "test_pipeline.test_asking_the_hub_again_where_there_is_none_trains_nothing": ["dvc repro -f download"],
    "test_experiments.test_an_experiment_runs_the_trial_alone": ["dvc exp run"],
    "test_experiments.test_an_experiment_in_a_temporary_copy_leaves_the_workspace_alone": ["dvc exp run --temp"],
    "test_experiments.test_a_sweep_of_two_workers_runs_the_code_that_was_queued_and_leaves_the_shared_cache_whole": [
        "dvc exp run --queue",
        "dvc queue start",
        "dvc queue start -j 2",
        "dvc queue status",
    ],
    "test_team.test_an_experiment_of_one_is_the_others_without_a_training": [
        "dvc exp push origin NAME",
        "dvc exp pull origin NAME",
        "dvc exp apply NAME",
    ],
    "test_pipeline.test_experiments_are_removed_and_their_networks_with_them": [
        "dvc exp remove --all-commits",
        "dvc gc --workspace --all-branches",
        "make show",
    ],
    "test_pipeline.test_what_a_reader_looks_at_is_there": [
        "dvc exp show --only-changed",
        "dvc metrics show",
        "dvc metrics diff",
        "dvc params diff",
        "make plan",
        "make plan MEMORY=24GiB",
        "make docs",
        "make schema",
        'make sample PROMPT="Once upon a time"',
        "python -m pipeline.tools.compare padded bf16",
        "python -m pipeline.tools.compare experiments/runs/xeon-amx.json",
    ],
    "test_pipeline.test_a_machines_own_numbers_are_committed_and_the_last_commit_is_a_way_back": [
        "dvc commit trial",
        "git add params.yaml dvc.lock pipeline/environment-stage/dvc.lock results docs/levels",
        'git commit -m "My machine"',
    ],
    "climbing.get_back": ["dvc checkout", "git restore params.yaml dvc.lock results docs/levels"],
    "test_team.team": ["dvc remote add --default store /a/folder/all/see", "dvc push", "git clone"],
    "test_pipeline.test_ones_own_keys_stay_out_of_git": ["dvc remote modify --local store profile NAME"],
    "test_team.test_a_fresh_clone_trains_without_the_store_and_does_not_with_it": ["dvc pull"],
    "Git's own, with the team's server": ["git push", "git pull"],
    "test_pipeline.test_a_longer_benchmark_stays_until_something_changes": [
        "make benchmark",
        "make benchmark ROUNDS=100",
    ],
    "test_pipeline.test_plots_are_a_page_that_loads_nothing": ["make plots"],
    "needs a network": [
        "make hellaswag LIMIT=500",
        "make pins",
        "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu",
        "apt install python3-dev python3-venv git make g++",
        "pip install dvc-s3",
        "rm -rf .venv",
        ".venv/bin/pip check",
    ],
    "takes 20 minutes and installs packages; its `dvc repro` is the climb of the tests": ["make repro"],
    "is what runs this": ["make test"],
    "is the other half of .ci/run": ["make check"],
    "needs a GPU; test_gpu.py is rehearsed by a test": ["make test-gpu"],
    "names the process; test_ranks.py sends it a SIGTERM": ["python -m pipeline.train"],
    "takes minutes: it measures": [
        "python -m pytest -m long -n 0",
        "python experiments/memory.py",
        "python experiments/determinism.py",
        "python experiments/overheads.py",
        "python experiments/race.py",
        "python experiments/sampling.py",
        "python experiments/scaling.py",
        "python experiments/tokenizing.py",
        "python experiments/reliability.py",
    ],
    "the head of a column, whose tests belong to the suite": ["python -m pytest -n 0"],
    "needs two machines; test_ranks.py starts two ranks on one": [
        "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id ladder "
        "--rdzv-endpoint HOST:29400 -m pipeline.trial"
    ],
    "names a folder of one's own": ["dvc add corpus"],
    "needs a terminal; test_tracking.py reads runs by its `inspect`": ["wandb leet wandb"],
    "needs an account": ["wandb login"],
    "test_pipeline.test_the_trial_is_shared_with_the_facts_of_its_run_and_not_with_anothers": [
        "make share FOLDER=../my-gpt2"
    ],
    "is named as what does not work": ["wandb offline"],
    "test_docs.test_the_readmes_look_for_bfloat16_finds_what_the_environment_stage_does": [
        "grep -cwE '(avx512_|amx_)?bf16' /proc/cpuinfo"
    ],
    "sets the shell that it is typed into": ["source .venv/bin/activate", "export USER=$(id -u)"],
    "test_repository.py runs them as the warnings print them": [
        "git fetch --unshallow",
        "git switch main",
        "git config user.name NAME",
        "git config user.email EMAIL",
    ],
}
HELD_BY = {command: held for held, many in HELD.items() for command in many}


def spans(page) -> list[str]:
    """What a page has in code fences, line by line, and in inline code; of the source code that it shows, nothing."""
    text = page.read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [line for kind, body in fence.findall(text) if not kind for line in body.replace("\\\n", "").splitlines()]
    return [line.split(" #")[0] for line in lines] + re.findall(r"`([^`]+)`", fence.sub("", text))


def commands() -> dict[str, list[str]]:
    """Every command in the pages, as HELD has it, and the values that its -S set."""
    found: dict[str, list[str]] = {}
    for page in (page for page in PAGES if page.name != "LOG.md"):
        for one in (part for span in spans(page) for part in re.split(r"&&|;", span)):
            words = re.sub(r"^(\w+=\S+ )+", "", " ".join(one.split())).split()
            if len(words) > 1 and words[0].removeprefix(".venv/bin/") in PROGRAMS:
                values = re.findall(r"-S '?([^ ']+)'?", one)
                found.setdefault(re.sub(r" -S \S+", "", " ".join(words)), []).extend(
                    [" ".join(values)] if values else []
                )
    return found


def source_of(test: str) -> str:
    """The source of a function of tests/, by file and name, its parameters with it; empty where there is none."""
    file, _, name = test.partition(".")
    text = (REPOSITORY / "tests" / f"{file}.py").read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return "".join(ast.unparse(node) for node in found)


def test_every_command_is_executed_by_a_test_or_marked_with_the_reason_why_not():
    assert set(commands()) == set(HELD_BY), "a command in a page needs a row in HELD, and a row a command"
    for command, held in HELD_BY.items():
        if " " in held:
            continue
        source = source_of(held)
        assert source, f"{command}: there is no test {held}"
        verb = re.match(r"\w+( [a-z]+\b)?", command).group()  # whose words stand in a string or in several
        assert re.search(rf"\b{verb}\b".replace(" ", "(', '| )"), source), f"{held} does not run {command}"


@pytest.mark.parametrize("command", [command for command in HELD_BY if command.startswith("make ")])
def test_every_make_target_is_one(command):
    dry = [*shlex.split(command), "--dry-run", "--old-file", ".venv/installed"]
    assert subprocess.run(dry, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_every_script_and_test_file_that_a_page_names_is_there():
    paths = {
        word for page in PAGES for span in spans(page) for word in span.split() if re.match(r"[\w./]+/\w+\.py$", word)
    }
    assert len(paths) > 10
    assert [path for path in paths if not ((REPOSITORY / path).exists() or (REPOSITORY / "src" / path).exists())] == []


def changes() -> list[str]:
    """Every set of `-S`, and every `key=value` that a table offers for one, tried on a GPU's shape."""
    loose = [span for span in spans(REPOSITORY / "README.md") if re.fullmatch(r"[a-z_.]+=[\w.]+", span)]
    return sorted({one for many in commands().values() for one in many} | {f"machine=gpu {one}" for one in loose})


@pytest.mark.parametrize("values", changes())
def test_every_change_that_a_page_makes_is_one_that_params_yaml_takes(values, tmp_path):
    path = tmp_path / "params.yaml"
    for sweep in get_hydra_sweeps({str(path): values.split()}):
        shutil.copy(REPOSITORY / "params.yaml", path)
        apply_overrides(path, sweep[str(path)])  # as DVC does
        params_yaml.load(path)


def test_every_relative_link_and_picture_is_there():
    pages, found = [*PAGES, *REPOSITORY.glob("results/**/*.md")], 0
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page.relative_to(REPOSITORY)}: {link}"
                found += 1
    assert found > 40


def test_the_readmes_look_for_bfloat16_finds_what_the_environment_stage_does():
    command = next(one for one in commands() if one.startswith("grep"))
    count = subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
    assert (int(count) > 0) == environment.describe().bf16
