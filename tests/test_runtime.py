"""Precision, compilation and what a machine can and cannot do."""

import pytest
import torch
from conftest import random_ids, tiny

from gpt2_ladder import runtime
from gpt2_ladder.config import Environment, Switches, UserError
from gpt2_ladder.model import GPT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore_precision():
    yield
    torch.set_float32_matmul_precision("highest")


def environment(**changes: object) -> Environment:
    facts = {"device": "cpu", "device_name": "x", "bf16": True, "compile_problem": None, "threads": 1}
    return Environment.model_validate({**facts, "python": "3", "torch": "2", "platform": "Linux", **changes})


def switches(**changes: object) -> Switches:
    row = {"tie_weights": True, "init": "gpt2", "precision": "fp32", "compile": False, "attention": "eager"}
    return Switches.model_validate({**row, "vocab_size": 50257, **changes})


@pytest.mark.parametrize(
    ("precision", "matmul", "dtype"),
    [("fp32", "ieee", torch.float32), ("tf32", "tf32", torch.float32), ("bf16", "ieee", torch.bfloat16)],
)
def test_a_precision_sets_the_matmul_mode_and_the_dtype_of_products(precision, matmul, dtype):
    context = runtime.set_precision(precision, CPU)
    for _ in range(2):  # the context is entered anew at every step
        with context:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert runtime.float32_matmul_precision() == matmul


def test_tf32_does_not_stay_on_for_the_next_precision():
    runtime.set_precision("tf32", CPU)
    runtime.set_precision("bf16", CPU)
    assert runtime.float32_matmul_precision() == "ieee"


def test_an_unknown_precision_is_refused():
    with pytest.raises(KeyError, match="fp8"):
        runtime.set_precision("fp8", CPU)


def test_a_compiled_model_keeps_its_parameter_names_and_its_output():
    plain, compiled = GPT(tiny(n_layer=1)), GPT(tiny(n_layer=1))
    runtime.compile_model(compiled)
    torch.testing.assert_close(compiled(random_ids())[0], plain(random_ids())[0], rtol=0, atol=1e-6)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert runtime.compile_cache() in ("cold", "warm")


def test_a_level_is_skipped_only_where_the_machine_cannot_run_it():
    assert runtime.why_skipped(switches(precision="bf16", compile=True), environment(), False) is None
    without_compiler = environment(compile_problem="no C++ compiler")
    assert "no C++ compiler" in (runtime.why_skipped(switches(compile=True), without_compiler, True) or "")
    assert runtime.why_skipped(switches(), without_compiler, False) is None
    old_cpu, old_gpu = environment(bf16=False), environment(bf16=False, device="cuda")
    assert "bfloat16" in (runtime.why_skipped(switches(precision="bf16"), old_cpu, False) or "")
    assert runtime.why_skipped(switches(precision="bf16"), old_cpu, True) is None
    assert runtime.why_skipped(switches(precision="bf16"), old_gpu, False) is None
    compiled = switches(precision="bf16", compile=True)
    assert "compute capability 8.0" in (runtime.why_skipped(compiled, old_gpu, True) or "")


def test_a_switch_without_effect_or_hardware_is_noted():
    assert "no effect" in (runtime.what_to_know(switches(precision="tf32"), environment()) or "")
    assert "emulated" in (runtime.what_to_know(switches(precision="bf16"), environment(bf16=False)) or "")
    assert runtime.what_to_know(switches(precision="tf32"), environment(device="cuda")) is None
    assert "no TF32" in (runtime.what_to_know(switches(precision="tf32"), environment(device="cuda", bf16=False)) or "")
    assert runtime.what_to_know(switches(precision="bf16"), environment()) is None


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"lists a GPU, but torch .* cannot use it"):
        runtime.open_device("cuda", threads=torch.get_num_threads())


def test_a_gpu_that_nvidia_smi_does_not_list_is_not_ignored(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"lists no GPU, but torch .* sees one"):
        runtime.open_device("cpu", threads=torch.get_num_threads())


def test_peak_memory_covers_what_was_allocated():
    before = runtime.peak_memory_mib(CPU)
    torch.ones(int(before + 100) * 2**20, dtype=torch.uint8)
    assert before + 100 <= runtime.peak_memory_mib(CPU) < 3 * (before + 100)
