"""The environment stage: how it describes a machine. test_repository.py tests its warnings."""

import os
import re
import runpy
from getpass import getuser
from pathlib import Path

import pytest
import torch

from gpt2_ladder.config import UserError
from helpers.climbing import call
from helpers.common import REPOSITORY
from pipeline import environment

X86 = "flags : fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile"
BOARD = "processor : 0\nFeatures : fp asimd bf16\n\nprocessor : 1\nFeatures : fp asimd bf16\n\nRevision : c03112\n"
MAINFRAME = "features : esan3 zarch\nprocessor 0: version = 00, machine = 8561\n\ncpu number : 0\n"
INDUCTOR = Path(torch.__file__).parent / "_inductor"


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder that stands for /proc and /sys of a machine with four processors."""
    for name in ("PROC", "SYS"):
        monkeypatch.setattr(environment, name, tmp_path / name.lower())
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(environment, "compile_problem", lambda **_: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_environment_does_not_contain_the_commit():
    """Every level would be trained again after each commit."""
    assert "commit" not in environment.describe().model_dump()


@pytest.mark.parametrize(("value", "threads"), [("7", 7), ("4,2", 4), (" 4 , 2 ", 4), ("", 4), (" ", 4), (None, 4)])
def test_omp_num_threads_sets_the_number_of_threads(machine, monkeypatch, value, threads):
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert environment.describe().threads == threads


@pytest.mark.parametrize("value", ["auto", "2.0", "0", "-1", "00", ",2", "4;2", "1e1", "9" * 20])
def test_an_invalid_number_of_threads_is_refused(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UserError, match=rf"^OMP_NUM_THREADS={value}: set it to a number of threads, 1 to 9999, or"):
        environment.describe()


@pytest.mark.parametrize(
    ("cpuinfo", "name", "bf16"),
    [
        (f"processor : 0\nmodel name : X 1\n{X86}\n\nprocessor : 1\nmodel name : X 1\n{X86}\n", "X 1, amx_bf16", True),
        ("processor : 0\nmodel name : X 1\nflags : fpu avx2 avx512f avx512_bf16\n", "X 1, avx512_bf16", True),
        ("processor : 0\nmodel name : X 1\nflags : fpu avx2\n", "X 1, avx2", False),
        ("Features : fp asimd bf16\nmodel name : X 1\n", "X 1, bf16", True),
        ("flags\t:\n\nmodel name\t:\n\nmodel name : X 1\nflags : avx2\n\nflags :", "X 1, avx2", False),
        (BOARD, "arm, bf16", True),
        (MAINFRAME, "arm", False),
        (None, "arm", False),
    ],
)
def test_a_processors_name_ends_in_its_best_vector_instructions(machine, monkeypatch, cpuinfo, name, bf16):
    """A virtual machine may hide AMX: bf16 was 1.82 times as fast as fp32 with it, and slower without it."""
    monkeypatch.setattr(environment.platform, "processor", lambda: "arm")
    if cpuinfo is not None:
        write(machine / "proc/cpuinfo", cpuinfo)
    result = environment.describe()
    assert (result.device_name, result.bf16, result.threads) == (name, bf16, 4)


def test_two_hyperthreads_are_one_core(machine):
    for cpu in range(4):
        write(machine / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}\n")
    assert environment.describe().threads == 2


@pytest.mark.parametrize(
    ("cgroup", "files", "threads"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # a container under version 2
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, 2),
        ("0::/of/the/host\n", {"cpu.max": "100000 100000\n"}, 1),
        ("3:cpuset:/\n1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu,cpuacct:/d/1\n", {"cpu/d/1/cpu.cfs_quota_us": "210000\n", "cpu/d/1/cpu.cfs_period_us": "100000\n"}, 3),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        # of another controller
        ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("", {"cpu.max": "50000 100000\n"}, 4),
    ],
)
def test_a_containers_cpu_quota_limits_the_threads(machine, monkeypatch, cgroup, files, threads):
    write(machine / "proc/self/cgroup", cgroup)
    for name, text in files.items():
        write(machine / "sys/fs/cgroup" / name, text)
    assert environment.describe().threads == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environment.describe().threads == 4


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a shell script first on PATH. GPUs are not hidden."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return put


def test_nvidia_smi_finds_an_nvidia_gpu(install, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda _: "2.13.0")  # not the CPU's wheel
    monkeypatch.setattr(environment, "compile_problem", lambda links_torch: f"links torch: {links_torch}")
    for capability, bf16 in (("9.0", True), ("7.5", False)):
        install("nvidia-smi", f"echo NVIDIA X, {capability}")
        result = environment.describe()
        assert (result.device, result.device_name, result.bf16) == ("cuda", "NVIDIA X", bf16)
        assert result.compile_problem == "links torch: False"  # code compiled for a GPU does not link torch
    install("nvidia-smi", "echo Tesla P100-PCIE-16GB, 6.0")
    assert environment.describe().compile_problem == "Triton needs a GPU with compute capability 7.0 or more"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.describe().device == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    install("nvidia-smi", "echo No devices were found")
    assert environment.describe().device == "cpu"


@pytest.mark.parametrize(
    ("torch_version", "cuda", "driver", "has", "fix"),
    [
        (
            "2.13.0",
            "'13.0'",
            "570.86.15",
            "12.8",
            ", run `.venv/bin/python -m pip install torch==2.13.0+cu126 --extra-index-url https:",
        ),
        ("2.11.0+cu126", "'12.6'", "470.82", "11.4", ", or run `make repro TORCH=installed` if"),
        ("3.0", "'14.0'", "580.65.06", "13.0", ", or run `make repro TORCH=installed` if"),
        ("2.13.0", "'13.2'", "580.65.06", "13.0", None),  # a minor version does not matter
        ("2.13.0", "'13.0'", "535.104", "13.0", None),  # a container with CUDA's compatibility package
        ("2.11.0+cu128", "'12.8'", "535.104", "12.2", None),
        ("2.13.0", "'13.0'", "535.104", "N/A", None),
        ("2.13.0+rocm7.2", "None", "535.104", "12.2", None),
    ],
)
def test_a_driver_that_is_too_old_for_torch_is_refused_with_the_fix(install, torch_version, cuda, driver, has, fix):
    install("nvidia-smi", f"echo '| NVIDIA-SMI {driver}    Driver Version: {driver}    CUDA Version: {has}     |'")
    source = f"__version__ = '{torch_version}'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    if fix is None:
        environment._check_driver(torch_version, source)
        return
    needs = f"torch {torch_version} needs CUDA {cuda[1:3]}, but the NVIDIA driver {driver} has CUDA {has}"
    start = re.escape(f"{needs}: update the driver (525 or newer has CUDA 12, 580 CUDA 13){fix}")
    with pytest.raises(UserError, match=f"^{start}.*came with its own torch$"):
        environment._check_driver(torch_version, source)


def test_the_cuda_version_of_torch_is_read_without_importing_it(install, monkeypatch):
    install("nvidia-smi", "echo NVIDIA X, 9.0")
    monkeypatch.setattr(environment, "version", lambda _: "2.13.0")
    monkeypatch.setattr(environment, "compile_problem", lambda links_torch: None)
    seen = []
    monkeypatch.setattr(environment, "_check_driver", lambda *arguments: seen.append(arguments))
    assert environment.describe().device == "cuda"
    assert seen == [("2.13.0", Path(torch.__file__).with_name("version.py").read_text())]


def test_a_missing_compiler_and_missing_python_headers_are_reported(monkeypatch, tmp_path):
    assert "no C++ compiler: 'no-such-compiler'" in (environment.compile_problem("no-such-compiler") or "")
    assert environment.compile_problem() is None
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python.h is missing" in (environment.compile_problem() or "")


def test_a_compiler_that_fails_gives_the_same_reason_each_time(install, monkeypatch):
    """A changed reason would retrain every level."""
    assert environment.compile_problem("false") == "'false' cannot build a shared library: it gave no reason"
    install("broken-g++", 'echo "/usr/bin/ld: /tmp/cc$$.o: bad" >&2; exit 1')
    first = environment.compile_problem("broken-g++")
    assert first == environment.compile_problem("broken-g++")
    assert first == "'broken-g++' cannot build a shared library: /usr/bin/ld: probe.o: bad"
    monkeypatch.setattr(environment, "PROBE", "#include <no-such-header.h>\n")
    assert "no-such-header.h" in (environment.compile_problem() or "")


def test_a_path_that_inductor_cannot_pass_to_the_compiler_is_reported(tmp_path, monkeypatch):
    folder = tmp_path / "my project"
    folder.mkdir()
    problem = "torch does not quote the path of {}: choose one without blanks, quotes and backslashes".format
    for name, shown in (("TMPDIR", "TMPDIR or USER"), *((n, n) for n in ("TORCHINDUCTOR_CACHE_DIR", "CXX"))):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(folder))
            patch.setattr(environment.tempfile, "tempdir", None)  # Python caches TMPDIR
            assert environment.compile_problem() == problem(shown)
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    distribution = environment.distribution("torch")
    monkeypatch.setattr(distribution, "locate_file", lambda name: folder / name)
    monkeypatch.setattr(environment, "distribution", lambda _: distribution)
    assert environment.compile_problem() == problem("the Python environment")
    assert environment.compile_problem(links_torch=False) is None
    (folder / "torch").rename(tmp_path / "torch")
    monkeypatch.setattr(distribution, "locate_file", lambda name: tmp_path / name)
    assert environment.compile_problem() is None
    (tmp_path / "torch").unlink()
    assert "cannot find -ltorch" in (environment.compile_problem() or "")


def test_torch_does_not_quote_the_paths_of_its_libraries_yet():
    """If this fails, torch has fixed it: stop refusing such a path of the Python environment."""
    assert 'f"-L{lib_dir} "' in (INDUCTOR / "cpp_builder.py").read_text()


def test_a_folder_that_inductor_cannot_use_is_reported(tmp_path, monkeypatch, install):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    fix = "; set TORCHINDUCTOR_CACHE_DIR (or TMPDIR) to another"
    assert environment.compile_problem() == f"Inductor's folder cannot be used: File exists{fix}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/below"))
    assert environment.compile_problem() == f"Inductor's folder cannot be used: Not a directory{fix}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "made/here"))
    assert environment.compile_problem() is None
    # its library cannot be loaded, as in a folder mounted with noexec
    install("g++", 'case $PWD in "$TORCHINDUCTOR_CACHE_DIR"/*) echo no library > probe.so;; *) false; esac')
    reason = "it holds libraries that cannot be loaded, as if mounted with noexec"
    assert environment.compile_problem() == f"Inductor's folder cannot be used: {reason}{fix}"


@pytest.mark.parametrize("user", ["ada", "DOMAIN\\ada:1", None])
def test_the_compiler_is_tried_in_the_folder_that_inductor_will_use(tmp_path, monkeypatch, user):
    """The folder's name contains the user's name, or the user id if it has no passwd entry."""
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    if user:
        monkeypatch.setenv("USER", user)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises((KeyError, OSError)):
            getuser()
    assert environment.compile_problem() is None
    folder = runpy.run_path(str(INDUCTOR / "runtime/cache_dir_utils.py"))["default_cache_dir"]()
    assert [str(path) for path in tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(("given", "exported"), [("ada", "ada"), ("", "12345"), (None, "12345")])
def test_make_sets_user_for_a_user_id_without_a_name(install, monkeypatch, given, exported):
    install("id", "[ $1 = -u ] && echo 12345")  # as for a user id without a passwd entry
    monkeypatch.delenv("USER", raising=False)
    if given is not None:
        monkeypatch.setenv("USER", given)
    assert call(REPOSITORY, "make", "--no-print-directory", "--eval", "user:; @echo $$USER", "user") == f"{exported}\n"
