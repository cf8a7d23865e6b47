"""Precision and compilation act as their names say."""

from unittest import mock

import pytest
import torch

from gpt2_ladder.model import GPT
from gpt2_ladder.training import runtime
from gpt2_ladder.training.precisions import PRECISIONS
from helpers import processes
from helpers.common import random_ids, tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore_precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("before", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("precision", "matmul", "dtype"),
    [
        ("fp32", "ieee", torch.float32),
        ("tf32", "tf32", torch.float32),
        ("bf16", "ieee", torch.bfloat16),
        ("fp16", "ieee", torch.float16),
    ],
)
def test_a_precision_sets_matmul_mode_and_dtype_after_any_other(before, precision, matmul, dtype):
    runtime.set_precision(before, CPU)
    context = runtime.set_precision(precision, CPU)
    for _ in range(2):  # every step enters the context again
        with context:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert runtime.float32_matmul_precision() == matmul


def test_only_fp16_scales_the_loss():
    """float16's smallest number is 6e-8; many elements of a gradient are smaller."""
    enabled = [name for name in PRECISIONS if runtime.make_scaler(name, CPU).is_enabled()]
    assert enabled == ["fp16"]


def test_an_unknown_precision_is_refused():
    with pytest.raises(KeyError, match="fp8"):
        runtime.set_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("switches", "options"),
    [
        ({}, None),
        ({"autotune": True}, {"max_autotune": True, "triton.cudagraphs": False}),
        ({"autotune": True, "cuda_graphs": True}, {"max_autotune": True, "triton.cudagraphs": True}),
    ],
)
def test_each_switch_of_the_compiler_is_one_option_that_torch_knows(switches, options):
    network = torch.nn.Linear(2, 2)
    with mock.patch.object(network, "compile", wraps=network.compile) as compiling:
        runtime.compile_model(network, **switches)  # torch refuses an unknown option
    compiling.assert_called_once_with(dynamic=False, fullgraph=True, options=options)


@pytest.mark.slow
def test_a_compiled_model_keeps_its_parameter_names_and_its_output():
    plain, compiled = GPT(tiny(n_layer=1)), GPT(tiny(n_layer=1))
    runtime.compile_model(compiled)
    torch.testing.assert_close(compiled(random_ids())[0], plain(random_ids())[0], rtol=0, atol=1e-6)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert runtime.compile_cache() in ("cold", "warm")


def test_a_memory_format_is_pickled_in_the_same_way_whatever_was_imported_first():
    """Otherwise Inductor's cache misses in one stage what another one compiled."""
    code = """if True:
        import pickle, sys, types
        sys.modules["first"] = first = types.ModuleType("first")
        import torch
        {rest}
        from gpt2_ladder.training import runtime
        copied = pickle.loads(data := pickle.dumps(torch.contiguous_format))
        print(data.hex(), copied is torch.contiguous_format)
    """
    outputs = {processes.run(code.format(rest=rest)) for rest in ("first.torch = torch", "")}
    assert len(outputs) == 1
    assert outputs.pop().endswith(" True\n")
