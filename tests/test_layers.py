"""Who may import whom, and that dvc.yaml knows it."""

import ast

import processes
import pytest
from conftest import REPOSITORY
from ruamel.yaml import YAML

SOURCE, PIPELINE = REPOSITORY / "src" / "gpt2_ladder", REPOSITORY / "pipeline"
LEAVES = {
    *("config", "model", "data", "runtime", "devices", "ranks", "artifacts", "metrics", "cost", "gains", "parity"),
    *("profiling", "charts", "files", "params_yaml", "tokenizer", "documents"),
}
UNLISTED = {"config", "params_yaml", "files", "checkpoints", "tracking", "progress"}  # see the head of dvc.yaml
STAGES = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]


def imports(path, package) -> set[str]:
    """The modules of `package` that the file at `path` imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{package}.")}
    folder = {"gpt2_ladder": SOURCE, "pipeline": PIPELINE}[package]
    return {name for name in names if (folder / f"{name}.py").exists()}


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_nothing_of_ours_but_config_and_how_files_are_written(leaf):
    assert imports(SOURCE / f"{leaf}.py", "gpt2_ladder") <= {"config", "files"}


def test_nobody_in_src_imports_the_pipeline():
    for path in SOURCE.glob("*.py"):
        assert not imports(path, "pipeline"), path


def reach(module: str) -> set[str]:
    """The files that importing pipeline.<module> brings in, as dvc.yaml writes them, without UNLISTED."""
    stages, sources, todo = set(), set(), [PIPELINE / f"{module}.py"]
    while todo:
        path = todo.pop()
        known = stages if path.parent == PIPELINE else sources
        if path.stem in known or (path.parent == SOURCE and path.stem in UNLISTED):
            continue
        known.add(path.stem)
        todo += [SOURCE / f"{name}.py" for name in imports(path, "gpt2_ladder")]
        todo += [PIPELINE / f"{name}.py" for name in imports(path, "pipeline")]
    return {f"pipeline/{name}.py" for name in stages} | {f"src/gpt2_ladder/{name}.py" for name in sources}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_depends_on_the_code_that_it_imports(stage):
    module = STAGES[stage]["cmd"].split("pipeline.")[1].split()[0]
    listed = {path for path in STAGES[stage]["deps"] if path.endswith(".py")}
    assert listed == reach(module)


def test_another_number_of_devices_trains_again():
    assert {name for name, stage in STAGES.items() if "devices" in stage.get("params", ())} == {"train", "trial"}


@pytest.mark.parametrize("stage", ["overfit", "train", "trial"])
def test_a_training_stage_does_not_wait_for_imports_that_it_does_not_need(stage):
    heavy = ["transformers", "altair", "pandas", "scipy", "torch._dynamo", "torch._inductor"]  # the last two: 2 s
    code = f"import sys, pipeline.{stage}; print([name for name in {heavy} if name in sys.modules])"
    assert processes.run(code) == "[]\n"
