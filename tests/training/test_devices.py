"""Which levels a device can run, what it reports, and that only devices.py asks which device it is."""

import ast
import os
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Switches, UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.training import capabilities, devices, runtime
from helpers import processes
from helpers.common import REPOSITORY, environment, tiny
from helpers.fake_gpu import CUDA, FakeGPU
from pipeline import ENVIRONMENT, TRIAL, read_environment
from pipeline import environment as environment_stage

CPU = torch.device("cpu")


def switches(**changes: object) -> Switches:
    return Switches.model_validate({**params_yaml.load(REPOSITORY / "params.yaml").switches.model_dump(), **changes})


def test_a_level_is_skipped_only_if_the_machine_cannot_run_it():
    assert capabilities.why_skipped(switches(precision="bf16", compile=True), environment(), False) is None
    without_compiler = environment(compile_problem="no C++ compiler")
    assert "no C++ compiler" in (capabilities.why_skipped(switches(compile=True), without_compiler, True) or "")
    assert capabilities.why_skipped(switches(), without_compiler, False) is None
    old_cpu, old_gpu = environment(bf16=False), environment(bf16=False, device="cuda")
    assert "bfloat16" in (capabilities.why_skipped(switches(precision="bf16"), old_cpu, False) or "")
    assert capabilities.why_skipped(switches(precision="bf16"), old_cpu, True) is None
    assert capabilities.why_skipped(switches(precision="bf16"), old_gpu, False) is None
    compiled = switches(precision="bf16", compile=True)
    assert "compute capability 8.0" in (capabilities.why_skipped(compiled, old_gpu, True) or "")


def test_the_caching_allocator_needs_glibc_on_a_cpu(monkeypatch):
    caching = switches(allocator="caching")
    assert capabilities.why_skipped(caching, environment(), False) is None
    monkeypatch.setattr(capabilities.platform, "libc_ver", lambda: ("", ""))
    assert "needs glibc" in (capabilities.why_skipped(caching, environment(), False) or "")
    assert capabilities.why_skipped(caching, environment(device="cuda"), False) is None
    assert [capabilities.needs_own_process(caching, environment(device=name)) for name in ("cpu", "cuda")] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("machine", "rehearsal", "device", "message"),
    [
        ("cpu", False, "cpu", None),
        ("gpu", False, "cuda", None),
        ("gpu", True, "cpu", None),
        ("cpu", False, "cuda", r"machine: cpu, but this machine has a GPU \(A processor\): set machine: gpu"),
        ("cpu", True, "cuda", "machine: cpu, but this machine has a GPU"),
        ("gpu", False, "cpu", "machine: gpu, but this machine has no GPU .*: set machine: cpu .* or rehearsal: true"),
        ("cpu", True, "cpu", "set rehearsal: false"),
        ("gpu", True, "cuda", "set rehearsal: false"),
    ],
)
def test_the_row_of_the_other_machine_is_refused_unless_it_is_a_rehearsal(machine, rehearsal, device, message):
    with pytest.raises(UserError, match=message) if message else nullcontext():
        capabilities.check_machine(machine, rehearsal, environment(device=device))


@pytest.mark.parametrize("stage", ["overfit", "probe", "train untied", "train fp32", "trial", "benchmark"])
def test_every_stage_that_trains_or_measures_checks_the_machine_first(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("machine: cpu ", "machine: gpu "))
    write_json(ENVIRONMENT, environment().model_dump())
    files.write(TRIAL / "config.json", "the previous trial's")
    monkeypatch.setattr(devices, "open_device", lambda *_: pytest.fail("the stage started its work"))
    name, *arguments = stage.split()
    with pytest.raises(UserError, match="machine: gpu, but this machine has no GPU"):
        import_module(f"pipeline.{name}").main(*arguments)
    paths = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert paths == {"models/trial/config.json", "params.yaml", "results/environment.json"}


def test_a_rehearsal_is_part_of_the_devices_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "params.yaml").read_text()
    rehearsed = text.replace("machine: cpu ", "machine: gpu ").replace("rehearsal: false", "rehearsal: true")
    (tmp_path / "params.yaml").write_text(rehearsed)
    environment_stage.main()
    assert read_environment().device_name.endswith(" (rehearsal of a GPU's shape)")


PAGE_FAULTS = """
import resource
import torch
from gpt2_ladder.training import capabilities, devices, runtime
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(100 * 2**20, dtype=torch.uint8)  # freed immediately
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum(use() for _ in range(10)))
devices.keep_freed_memory(torch.device("cpu"))
print(sum([use() for _ in range(40)][-10:]))  # the heap grows during the first ones
"""


@pytest.mark.slow
def test_kept_memory_causes_no_page_faults():
    system, caching = map(int, processes.run(PAGE_FAULTS).split())
    assert system > 200_000 > 1_000 > caching  # 100 MiB are 25,600 pages of 4 KiB


OLD_GPU = environment(device="cuda", bf16=False)


@pytest.mark.parametrize(
    ("name", "value", "machine", "reason"),
    [
        ("precision", "tf32", environment(), "TF32 is a mode of NVIDIA GPUs"),
        ("precision", "tf32", OLD_GPU, "this GPU has no TF32"),
        ("precision", "tf32", environment(device="cuda"), None),
        ("precision", "bf16", environment(), None),
        ("allocator", "caching", environment(device="cuda"), "torch always keeps a GPU's freed memory"),
        ("allocator", "caching", environment(), None),
        ("autotune", True, environment(), "it chooses between kernels for GPUs"),
        ("autotune", True, environment(device="cuda"), None),
        ("cuda_graphs", True, environment(), "a CPU has no CUDA graphs"),
        ("cuda_graphs", True, environment(device="cuda"), None),
    ],
)
def test_a_switch_without_effect_on_a_device_is_left_out_with_a_reason(name, value, machine, reason):
    chosen = switches(**{"compile": True, name: value})
    reasons = capabilities.without_effect(chosen, machine)
    assert capabilities.effective(chosen, machine) == (switches(compile=True) if reason else chosen)
    if reason:
        assert reasons[name].startswith(f"`{name}: {str(value).lower()}` has no effect on this device: {reason}")
    else:
        assert reasons == {}


def test_only_a_speed_level_that_would_repeat_the_level_above_is_without_effect():
    levels = params_yaml.load(REPOSITORY / "params.yaml").levels
    assert list(capabilities.rows_without_effect(levels, environment())) == ["tf32", "autotune", "cuda_graphs"]
    assert list(capabilities.rows_without_effect(levels, environment(device="cuda"))) == ["allocator"]
    assert list(capabilities.rows_without_effect(levels, OLD_GPU)) == ["tf32", "allocator"]
    plain = levels["fp32"]
    own = {
        "fp32": plain,
        "two": plain.model_copy(update={"precision": "tf32", "attention": "flash"}),  # one of its changes acts
        "back": plain.model_copy(update={"attention": "flash"}),  # takes back a switch that does not act
        "same": plain.model_copy(update={"attention": "flash"}),  # changes nothing: trained, as its row asks
    }
    assert list(capabilities.rows_without_effect(own, environment())) == ["back"]
    quality = {name: level.model_copy(update={"group": "quality"}) for name, level in own.items()}
    assert capabilities.rows_without_effect(quality, environment()) == {}


def test_cuda_graphs_are_left_out_of_all_levels_if_a_step_has_several_micro_batches():
    levels, gpu = params_yaml.load(REPOSITORY / "params.yaml").levels, environment(device="cuda")
    reason = "`cuda_graphs: true` is left out: a step has 2 micro-batches, and torch may keep the gradient of only one"
    rows = capabilities.rows_without_effect(levels, gpu, 2)
    assert list(rows) == ["allocator", "cuda_graphs"]
    assert rows["cuda_graphs"].startswith(reason)
    assert reason in (capabilities.note_for(levels["chunked"], gpu, 2) or "")
    assert [capabilities.effective(levels["chunked"], gpu, parts).cuda_graphs for parts in (1, 2)] == [True, False]


def test_a_switch_without_effect_or_without_hardware_gets_a_note():
    assert "no effect" in (capabilities.note_for(switches(precision="tf32"), environment()) or "")
    assert "emulated" in (capabilities.note_for(switches(precision="bf16"), environment(bf16=False)) or "")
    assert capabilities.note_for(switches(precision="tf32"), environment(device="cuda")) is None
    assert "no TF32" in (
        capabilities.note_for(switches(precision="tf32"), environment(device="cuda", bf16=False)) or ""
    )
    assert capabilities.note_for(switches(precision="bf16"), environment()) is None


def test_a_gpu_that_only_nvidia_smi_or_only_torch_sees_is_an_error(monkeypatch):
    for name, message in (
        ("cuda", "has a GPU, but torch .* cannot use it"),
        ("cpu", "lists no GPU, but torch"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda name=name: name == "cpu")
        with pytest.raises(UserError, match=message):
            devices.open_device(name, torch.get_num_threads(), 0, False)


def test_free_and_peak_memory_are_in_bytes_and_mib():
    assert 2**28 < devices.free_memory(CPU) < 2**46
    before = devices.peak_memory_mib(CPU)
    torch.ones(int(before + 100) * 2**20, dtype=torch.uint8)
    assert before + 100 <= devices.peak_memory_mib(CPU) < 3 * (before + 100)
    assert devices.peak_memory_mib(CPU, reserved=True) == devices.peak_memory_mib(CPU)


def test_opening_a_device_seeds_the_random_generator():
    drawn = []
    for seed in (1, 1, 2):
        devices.open_device("cpu", torch.get_num_threads(), seed, deterministic=False)
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_opening_a_device_computes_the_first_square_root_in_one_thread():
    """If two threads compute it, it may have half the digits: a race in MKL that no test can provoke."""

    class Roots(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), options=None):
            if operator is torch.ops.aten.sqrt.default:
                sizes.append(args[0].numel())
            return operator(*args, **(options or {}))

    sizes: list[int] = []
    with Roots():
        devices.open_device("cpu", torch.get_num_threads(), 0, deterministic=False)
    assert sizes == [1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognized_on_every_device(error, expected):
    assert devices.is_out_of_memory(error) is expected


def test_the_error_of_a_cpu_that_runs_out_of_memory_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)


def test_the_reported_attention_kernel_is_the_one_that_torch_chooses():
    flash = tiny(attention="flash")
    assert devices.attention_kernel(flash, "fp32", 2, 16, CPU) == "FLASH_ATTENTION"
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        assert devices.attention_kernel(flash, "fp32", 2, 16, CPU) == "MATH"
    assert devices.attention_kernel(tiny(), "fp32", 2, 16, CPU) is None


@pytest.fixture
def choose(monkeypatch):
    """A function that sets what torch chooses on a GPU that does not exist."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla X")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    return lambda number: monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: number)


@pytest.mark.parametrize(
    ("attention", "choice", "kernel"),
    [
        ("flash", 1, "FLASH_ATTENTION"),
        ("flash", 3, "CUDNN_ATTENTION"),
        ("cudnn", 3, "CUDNN_ATTENTION"),
        ("efficient", 2, "EFFICIENT_ATTENTION"),
        (
            "flash",
            0,
            r"attention: flash, but torch has only its math kernel for \(16, 2, 1024, 8\) in torch.bfloat16 on Te",
        ),
        (
            "cudnn",
            -1,
            r"attention: cudnn, but torch has no cudnn kernel for .* on Tesla X: set attention: flash, torch's",
        ),
    ],
)
def test_a_gpus_attention_kernel_is_recorded_or_refused(choose, attention, choice, kernel):
    choose(choice)
    refused = " " in kernel
    with pytest.raises(UserError, match=kernel) if refused else nullcontext():
        found = devices.attention_kernel(tiny(attention=attention), "bf16", 16, 1024, torch.device("cuda"))
    assert refused or found == kernel


@pytest.mark.parametrize("attention", ["cudnn", "efficient"])
def test_a_cpu_refuses_a_kernel_of_a_gpu(attention):
    message = (
        rf"attention: {attention}, but torch has no {attention} kernel for \(2, 2, 16, 8\) in torch.float32 on a CPU"
    )
    with pytest.raises(UserError, match=message):
        devices.attention_kernel(tiny(attention=attention), "fp32", 2, 16, CPU)


@pytest.mark.parametrize(
    ("device", "products"), [("cpu", ["fp32", "fp32", "bf16"]), ("cuda", ["fp32", "tf32", "bf16"])]
)
def test_only_a_gpu_has_a_matrix_product_in_tf32(device, products):
    assert [devices.product_precision(precision, device) for precision in ("fp32", "tf32", "bf16")] == products


def test_a_product_is_large_and_runs_in_its_precision_which_does_not_remain(monkeypatch):
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), options=None):
            if operator is torch.ops.aten.mm.default:
                seen.append((runtime.float32_matmul_precision(), args[0].dtype, len(args[0])))
            return operator(*args, **(options or {}))

    assert devices.PRODUCT_SIZES == {"cpu": 2048, "cuda": 8192}
    monkeypatch.setitem(devices.PRODUCT_SIZES, "cpu", 64)
    for precision in ("tf32", "bf16"):
        with Products():
            assert devices.matmul_tflops(precision, CPU) > 0
        assert runtime.float32_matmul_precision() == "ieee"
    assert seen == [("tf32", torch.float32, 64)] * 4 + [("ieee", torch.bfloat16, 64)] * 4


def test_a_product_is_timed_from_an_idle_gpu_to_an_idle_gpu(monkeypatch):
    class Matrix:
        def __matmul__(self, other: "Matrix") -> None:
            gpu.launch(2.0)

        def to(self, dtype: torch.dtype) -> "Matrix":
            gpu.launch(1.0)
            return self

    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(torch, "randn", lambda *_, device: Matrix())
    monkeypatch.setattr(devices, "set_precision", lambda *_: None)
    gpu.launch(5.0)  # of a step
    assert devices.matmul_tflops("bf16", CUDA) == 2 * 8192**3 / 2.0 / 1e12


DEVICES = {"cpu", "cuda"}


def asks_for_a_device(source: str) -> list[int]:
    """Return the lines that compare something with a device's name, or use torch.cuda."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            lines += [node.lineno] * bool(words & DEVICES)
        elif isinstance(node, ast.Attribute) and node.attr in DEVICES:
            lines += [node.lineno] * (isinstance(node.value, ast.Name) and node.value.id == "torch")
    return lines


def test_two_modules_ask_which_device_it_is():
    for path in [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "pipeline").rglob("*.py")]:
        assert bool(asks_for_a_device(path.read_text())) == (path.name in ("devices.py", "capabilities.py")), path
    assert asks_for_a_device("x = 1 if device.type == 'cpu' else 2")
    assert asks_for_a_device("torch.cuda.synchronize()")


def test_deterministic_algorithms_are_switched_on_and_off_again(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    devices.set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    devices.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
