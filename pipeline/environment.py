"""Record the environment that all measurements depend on: device, torch, threads, capabilities.

This stage runs at every `dvc repro`, so it does not import torch. Later stages run again only if its output changes.
"""

import ctypes
import getpass
import os
import platform
import re
import subprocess
import sysconfig
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Literal

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Environment, UserError
from pipeline import ENVIRONMENT, run

PROC, SYS = Path("/proc"), Path("/sys")
VOLTA, AMPERE = 7.0, 8.0  # the first compute capabilities that Triton compiles for, and with bfloat16
VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "bf16")  # instructions for matrix products, best first
# What Inductor needs from the compiler. Python.h is not included, because that takes four times as long as this check.
PROBE = "#if !__has_include(<Python.h>)\n#error Python.h\n#endif\n#include <omp.h>\n"


def main() -> None:
    params = params_yaml.load()  # a mistake in params.yaml stops the pipeline here
    warn_about_git()
    environment = describe()
    if params.rehearsal:  # recorded in the name, because every table shows the name
        name = f"{environment.device_name} (rehearsal of a GPU's shape)"
        environment = environment.model_copy(update={"device_name": name})
    print(f"{environment.device}: {environment.device_name}, {environment.threads} threads, torch {environment.torch}")
    files.write_json(ENVIRONMENT, environment.model_dump())


def warn_about_git() -> None:
    """Print a warning and the fix if the Git repository is in a state in which experiments or commits get lost."""
    folder = os.environ.get("DVC_ROOT", ".")  # `dvc exp run --temp` runs this stage in a copy
    state = files.git("-C", folder, "rev-parse", "--is-shallow-repository", "--abbrev-ref", "HEAD")
    if state is None:  # no Git, repository or commit: DVC reports these
        return
    shallow, head = state.split()
    names = {*(files.git("-C", folder, "config", "--list", "--name-only") or "").split(), *os.environ}
    if shallow == "true":
        print("warning: `dvc exp run --temp` or --queue saves nothing in a shallow clone; run `git fetch --unshallow`")
    if head == "HEAD" and "DVC_EXP_NAME" not in os.environ:  # `dvc exp run` detaches HEAD
        print("warning: HEAD is detached, so new commits belong to no branch; run `git switch main`, or your branch")
    if not ({"user.name", "user.email"} <= names or {"GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"} <= names):
        print("warning: Git has no identity; run `git config user.name NAME` and `git config user.email EMAIL`")


def describe() -> Environment:
    """Describe this machine without importing torch, which takes seconds."""
    torch_version = version("torch")
    device_name, cpu_flags, cores = _cpu()
    device: Literal["cpu", "cuda"] = "cpu"
    bf16 = bool(cpu_flags & {"avx512_bf16", "amx_bf16", "bf16"})
    links_torch, too_old = platform.system() != "Darwin", None  # Inductor's code links torch, except on macOS and GPUs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    hidden = visible in ("", "-1") or torch_version.endswith("+cpu")
    if not hidden and (gpu := _nvidia_gpu(visible)):
        device, device_name, bf16, links_torch = "cuda", gpu[0], gpu[1] >= AMPERE, False
        too_old = "Triton needs a GPU with compute capability 7.0 or more" if gpu[1] < VOLTA else None
        _check_driver(torch_version, distribution("torch").read_text("../torch/version.py") or "")
    return Environment(
        device=device,
        device_name=device_name,
        bf16=bf16,
        compile_problem=too_old or compile_problem(links_torch=links_torch),
        threads=_threads(cores),
        python=platform.python_version(),
        torch=torch_version,
        platform=f"{platform.system()} {platform.machine()}",
    )


def compile_problem(compiler: str | None = None, links_torch: bool = True) -> str | None:
    """Build a library as Inductor does. Return why torch.compile cannot work, or None if it can."""
    compiler = compiler or os.environ.get("CXX", "g++")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = f"uid_{os.getuid()}"
    # where Inductor keeps headers and libraries (its cache_dir_utils.py)
    headers = Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", headers)).absolute()
    python, torch = sysconfig.get_config_var("LIBDIR"), distribution("torch").locate_file("torch/lib")
    paths = {"CXX": compiler, "TMPDIR or USER": headers, "TORCHINDUCTOR_CACHE_DIR": cache}
    # link one of torch's libraries, and only if needed: linking all takes 50 ms, loading them 0.5 s
    link = [f"-L{python}", f"-L{torch}", "-Wl,--as-needed", "-ltorch"] if links_torch else []
    for name, path in (paths | {"the Python environment": "".join(link)}).items():
        if re.search(r"[\s'\"\\]", str(path)):
            return f"torch does not quote the path of {name}: choose one without blanks, quotes and backslashes"
    args = ["-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}", "-o", "probe.so", "probe.cpp", *link]
    try:
        headers.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=headers), tempfile.TemporaryDirectory(dir=cache) as folder:
            (Path(folder) / "probe.cpp").write_text(PROBE)
            # in the folder, so that no message contains its random name: a changed message retrains every level
            result = subprocess.run([compiler, *args], cwd=folder, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                ctypes.CDLL(f"{folder}/probe.so")
                return None
    except OSError as error:
        if error.filename == compiler:
            return f"no C++ compiler: '{compiler}': {error.strerror}; install g++ (apt install g++)"
        reason = error.strerror or "it holds libraries that cannot be loaded, as if mounted with noexec"
        return f"Inductor's folder cannot be used: {reason}; set TORCHINDUCTOR_CACHE_DIR (or TMPDIR) to another"
    if "Python.h" in result.stderr:
        return "Python.h is missing; install Python's headers (apt install python3-dev)"
    reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[0]
    return f"'{compiler}' cannot build a shared library: {re.sub(r'[^ ]*/cc[^ .]*', 'probe', reason)}"


def _nvidia_gpu(index: str) -> tuple[str, float] | None:
    """Return the name and compute capability of GPU `index`, or None if nvidia-smi does not list it."""
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        name, capability = output.strip().rsplit(", ", 1)
        return name, float(capability)
    except (OSError, subprocess.CalledProcessError, ValueError):  # no GPU, or a driver too old to know the field
        return None


def _check_driver(torch_version: str, version_py: str) -> None:
    """Raise UserError if the driver's CUDA has a lower major version than the one in `version_py`, a file of torch."""
    output = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    driver = re.search(r"Driver Version: *([\d.]+) .*CUDA Version: *((\d+)[\d.]*)", output)
    needed = re.search(r"^cuda\b.*'(\d+)\.", version_py, re.MULTILINE)  # docs.nvidia.com/deploy/cuda-compatibility
    if driver and needed and int(driver[3]) < int(needed[1]):
        wheel = f"torch=={torch_version.split('+')[0]}+cu126 --extra-index-url https://download.pytorch.org/whl/cu126"
        other = f", run `.venv/bin/python -m pip install {wheel}`" if driver[3] == "12" else ""
        raise UserError(
            f"torch {torch_version} needs CUDA {needed[1]}, but the NVIDIA driver {driver[1]} has CUDA {driver[2]}: "
            f"update the driver (525 or newer has CUDA 12, 580 CUDA 13){other}, or run `make repro TORCH=installed` if "
            "this machine came with its own torch"
        )


def _cpu() -> tuple[str, set[str], int]:
    """Return the processor's name, its flags, and the number of cores (not hyperthreads) that this process may use.

    The name ends with the processor's best entry of VECTORS, because a virtual machine may hide others.
    """
    line = r"^(model name|flags|Features)[ \t]*: *(\S.*)$"  # in any block, because some blocks have no processor
    fields = dict(re.findall(line, _read(PROC / "cpuinfo"), re.MULTILINE))
    flags = (fields.get("flags") or fields.get("Features", "")).split()  # x86, Arm
    name = fields.get("model name") or platform.processor() or platform.machine()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_read(SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in usable}
    return ", ".join([name, *(vector for vector in VECTORS if vector in flags)][:2]), set(flags), len(siblings)


def _threads(cores: int) -> int:
    """Return the first number in OMP_NUM_THREADS, or `cores` limited by the cgroup's CPU quota if it is not set."""
    if value := os.environ.get("OMP_NUM_THREADS", "").strip():
        if not (number := re.match(r"0*[1-9]\d{0,3}(?=\s*(,|$))", value)):
            raise UserError(f"OMP_NUM_THREADS={value}: set it to a number of threads, 1 to 9999, or unset it")
        return int(number[0])
    for controllers, path in re.findall(r"^\d+:(|[^:]*\bcpu\b[^:]*):(.*)$", _read(PROC / "self/cgroup"), re.MULTILINE):
        folder = SYS / f"fs/cgroup{'/cpu' if controllers else ''}{path}"  # version 1 or 2
        for group in (folder, *folder.parents):  # the limits of all levels apply; a container may see the root only
            limit = _read(group / "cpu.max") or _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")
            if quota := re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", limit):  # "max" and -1 mean no limit
                cores = min(cores, -(-int(quota[1]) // int(quota[2])))
    return max(1, cores)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    run(main)
