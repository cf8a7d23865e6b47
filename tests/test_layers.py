"""Rooms import only from lower floors, and dvc.yaml lists what a stage imports."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from helpers import processes
from helpers.common import REPOSITORY

SOURCE = REPOSITORY / "src" / "gpt2_ladder"
FLOORS = (  # a module imports from lower floors and from its own room (folder)
    {"config"},
    {"files", "params", "ledger"},
    {"params_yaml", "model"},
    {"training"},
    {"running", "measuring", "sources"},
    {"reporting"},
    {"using", "checking"},
    {"pipeline"},
    {"experiments"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
UNLISTED = {
    *("config", "params", "params_yaml", "files", "__init__"),
    *("checkpoints", "tracking", "progress", "ledger"),
}  # see dvc.yaml
STAGES = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
MODULES = sorted(
    path
    for top in ("src", "pipeline", "experiments")
    for path in (REPOSITORY / top).rglob("*.py")
    if path.stat().st_size
)


def room(path: Path) -> str:
    """Return the folder of `path`, or the module itself directly below src/gpt2_ladder."""
    top = SOURCE if SOURCE in path.parents else REPOSITORY
    return path.relative_to(top).with_suffix("").parts[0]


def imports(path: Path) -> set[Path]:
    """Return this repository's files that the file at `path` imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = {REPOSITORY / top / f"{name.replace('.', '/')}.py" for name in names for top in ("src", ".")}
    return {file for file in paths if file.exists()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_imports_only_from_its_own_room_or_the_floors_below(path):
    for other in imports(path):
        assert room(other) == room(path) or FLOOR[room(other)] < FLOOR[room(path)], other


def test_no_module_name_is_used_both_in_the_pipeline_and_in_src():
    stems = [{path.stem for path in MODULES if top in path.parts} for top in ("pipeline", "src")]
    assert stems[0] & stems[1] == {"__init__"}


def reach(module: str) -> set[Path]:
    """Return all files that pipeline.<module> imports, directly or not, without UNLISTED."""
    files, todo = set(), [REPOSITORY / "pipeline" / f"{module}.py"]
    while todo:
        path = todo.pop()
        if path not in files and path.stem not in UNLISTED:
            files.add(path)
            todo += imports(path)
    return files


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_depends_on_the_code_that_it_imports(stage):
    needed = reach(STAGES[stage]["cmd"].split("pipeline.")[1].split()[0])
    listed = {REPOSITORY / path for path in STAGES[stage]["deps"] if path.startswith(("src/", "pipeline/"))}
    listed -= {SOURCE / "reporting" / "templates"}
    assert {path for path in needed if not {path, path.parent} & listed} == set()
    assert {path for path in listed if not any(path in (file, file.parent) for file in needed)} == set()


def test_a_changed_number_of_devices_retrains_levels_and_trial():
    assert {name for name, stage in STAGES.items() if "devices" in stage.get("params", ())} == {"train", "trial"}


def test_a_changed_half_runs_every_stage_that_depends_on_a_precision():
    names = {"defaults", "levels", "precision"}
    by_precision = {name for name, stage in STAGES.items() if names & {*stage.get("params", ())}}
    assert {name for name, stage in STAGES.items() if "half" in stage.get("params", ())} == by_precision
    assert by_precision == {"overfit", "probe", "train", "parity", "trial", "report"}


def test_training_stages_import_no_slow_module_that_they_do_not_need():
    heavy = ["transformers", "altair", "pandas", "scipy", "torch._dynamo", "torch._inductor"]  # the last two: 2 s
    stages = "pipeline.overfit, pipeline.train, pipeline.trial"
    code = f"import sys, {stages}; print([name for name in {heavy} if name in sys.modules])"
    assert processes.run(code) == "[]\n"
