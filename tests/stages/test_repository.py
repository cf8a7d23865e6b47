"""The environment stage under Git and DVC: its warnings, where DVC runs it, and links into DVC's cache."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.climbing import call
from helpers.common import REPOSITORY
from pipeline import environment

pytestmark = pytest.mark.slow
IDENTITY = ("GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
NO_LINKS = "".join(f"int {name}() {{ return -1; }}" for name in ("link", "linkat", "symlink", "symlinkat"))


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A Git repository with only the environment stage, two commits on the branch main, and a Git identity."""
    folder = tmp_path / "repository"
    for name in ("src", "pipeline", ".dvc/config", ".dvcignore", "params.yaml", "Makefile", "requirements.txt"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(REPOSITORY / name, folder / name)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / ".gitignore").write_text("__pycache__/\n.venv\n")
    call(folder, "git", "init", "--quiet")
    call(folder, "git", "symbolic-ref", "HEAD", "refs/heads/main")
    call(folder, "git", "add", ".")
    for message in ("one", "two"):
        call(folder, "git", "commit", "--quiet", "--allow-empty", "--message", message)
    for name in IDENTITY:
        monkeypatch.setenv(name, "someone")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    return folder


@pytest.mark.parametrize("state", ["shallow", "detached", "no identity", "half an identity"])
def test_the_commands_in_a_git_warning_fix_its_cause(repository, monkeypatch, capsys, state):
    environment.warn_about_git()
    assert capsys.readouterr().out == ""
    folder = repository
    if state == "shallow":
        folder = repository.with_name("shallow")
        call(repository, "git", "clone", "--quiet", "--depth", "1", f"file://{repository}", str(folder))
        monkeypatch.setenv("DVC_ROOT", str(folder))
    elif state == "detached":
        call(folder, "git", "checkout", "--quiet", "--detach")
    else:
        monkeypatch.delenv(IDENTITY[0])
        call(folder, "git", "config", "user.email" if "half" in state else "user.other", "one")
    environment.warn_about_git()
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: ")
    for command in re.findall(r"`(git [^`]+)`", warning):
        call(folder, *command.split())
    environment.warn_about_git()
    assert capsys.readouterr().out == ""


def test_no_git_warning_where_dvc_works_or_reports_the_problem(repository, tmp_path, monkeypatch, capsys):
    call(repository, "git", "checkout", "--quiet", "--detach")
    monkeypatch.setenv("DVC_EXP_NAME", "every dvc exp run detaches HEAD")
    environment.warn_about_git()
    monkeypatch.delenv("DVC_EXP_NAME")
    (tmp_path / "unborn").mkdir()
    call(tmp_path / "unborn", "git", "init", "--quiet")
    for name in ("unborn", "no-folder", "."):  # no commit, no folder, no repository
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / name))
        environment.warn_about_git()
    monkeypatch.setenv("DVC_ROOT", str(repository))
    monkeypatch.setenv("PATH", str(tmp_path))  # no Git
    environment.warn_about_git()
    assert capsys.readouterr().out == ""


def test_dvc_runs_the_stage_only_from_the_repository_root(repository):
    assert "does not exist" in call(repository / "pipeline", "dvc", "repro", exit_code=255, stderr=True)
    for options in ((), ("--temp",)):  # this one runs it in a copy
        output = call(repository, "dvc", "exp", "run", *options)
        assert "Running stage 'pipeline/environment-stage/dvc.yaml:environment'" in output
        assert "warning" not in output


def test_an_experiment_in_a_copy_warns_about_the_real_repository(repository):
    call(repository, "git", "clone", "--quiet", "--depth", "1", f"file://{repository}", "../shallow")
    output = call(repository.with_name("shallow"), "dvc", "exp", "run", "--temp")
    assert "run `git fetch --unshallow`" in output
    assert "HEAD" not in output


def test_dvc_links_its_cache_and_copies_where_it_cannot_link(repository, tmp_path):
    (repository / "data").mkdir()
    (tmp_path / "no-links.c").write_text(NO_LINKS)
    call(tmp_path, "gcc", "-shared", "-fPIC", "no-links.c", "-o", "no-links.so")
    clone = ["cp", "--reflink=always", "dvc.yaml", "data/cloned"]  # DVC's first choice, if the file system supports it
    linked = 1 if subprocess.run(clone, cwd=repository, capture_output=True, check=False).returncode == 0 else 2
    preload = ("env", f"LD_PRELOAD={tmp_path}/no-links.so")
    for name, links, preloaded in (("linked", linked, ()), ("copied", 1, preload)):
        (repository / f"data/{name}").write_text(name)
        assert "could not be linked" not in call(repository, *preloaded, "dvc", "add", f"data/{name}", stderr=True)
        assert (repository / f"data/{name}").stat().st_nlink == links
