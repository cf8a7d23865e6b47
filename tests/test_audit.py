"""Every operator that a training step dispatches, compared with the switches of its level.

A level that is only slower than it should be has the right loss curve, so every operator of forward, backward and
optimizer is recorded, on a CPU, whose autocast and flash kernel stand for CUDA's. Planted faults must be found. A
recorder switches torch.compile off: compiled levels are recorded uncompiled, and their graphs are counted. The steps
that the benchmark times must follow the gradients of transformers.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ladder import model, params_yaml
from gpt2_ladder.config import AdamW, GPTConfig, Size, Switches
from gpt2_ladder.measuring import turns
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import devices, loop, runtime
from helpers.common import REPOSITORY, params_with, random_ids, tiny

CPU = torch.device("cpu")
LEVELS = params_yaml.load(REPOSITORY / "params.yaml").levels
B, T, N_LAYER = 2, 24, 2  # T differs from every other size, so that a (T, T) shape is attention's
MATMULS = ("aten.mm", "aten.addmm", "aten.bmm")
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Recorder(TorchDispatchMode):
    """Record the name, the types of the input tensors and the shapes of the output tensors of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.dtype], list[torch.Size]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        ins = [t.dtype for t in args if isinstance(t, torch.Tensor)]
        self.calls.append((str(func).removesuffix(".default"), ins, [t.shape for t in outs]))
        return out

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


def build(switches: Switches) -> GPT:
    """Return a small network with the switches that concern the network."""
    return GPT(tiny(n_layer=N_LAYER, **switches.model_dump(include=set(GPTConfig.model_fields))))


def record(switches: Switches) -> tuple[Recorder, GPT, tuple[torch.dtype | None, torch.dtype]]:
    """Return the operators of a step without the optimizer, the network, and the types of its logits and loss."""
    network = build(switches)
    outputs: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    network.register_forward_hook(lambda _, __, output: outputs.append(output))
    batch = random_ids(B, T), random_ids(B, T, seed=1)
    autocast = runtime.set_precision(switches.precision, CPU)
    with Recorder() as recorder:
        loop.accumulate(network, batch, autocast, CPU, micro_batch=B)
    ((logits, loss),) = outputs
    return recorder, network, (None if logits is None else logits.dtype, loss.dtype)


def audit(switches: Switches) -> None:
    """Assert that a step computes what its switches say."""
    recorder, network, (logits, loss) = record(switches)
    matmuls = [(name, ins) for name, ins, _ in recorder.calls if name in MATMULS]
    per_layer = 4 if switches.attention == "flash" else 6  # four linear layers; eager has two more products
    head = 4 * model.CHUNKS if switches.chunked_loss else 3  # backward computes a chunk's logits again
    assert len(matmuls) == 3 * N_LAYER * per_layer + head  # forward one, backward one for each factor
    assert {kind for _, ins in matmuls for kind in ins} == {TYPES[switches.precision]}
    flash = [name for name in recorder.names() if "scaled_dot_product_flash_attention" in name]
    assert len(flash) == (2 * N_LAYER if switches.attention == "flash" else 0)  # forward and backward
    squares = [shape for _, _, shapes in recorder.calls for shape in shapes if tuple(shape[-2:]) == (T, T)]
    assert bool(squares) == (switches.attention == "eager")
    whole_logits = [
        shape for _, _, shapes in recorder.calls for shape in shapes if shape == (B * T, switches.vocab_size)
    ]
    assert bool(whole_logits) != switches.chunked_loss
    assert "aten._local_scalar_dense" not in recorder.names()  # .item(): on a GPU it waits for all previous work
    assert (logits, loss) == (None if switches.chunked_loss else TYPES[switches.precision], torch.float32)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in network.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_computes_what_its_level_says(level):
    audit(LEVELS[level])


@pytest.mark.parametrize("level", ["bf16", "flash", "chunked"])
def test_a_step_in_fp16_multiplies_in_float16(level):
    audit(LEVELS[level].model_copy(update={"precision": "fp16"}))


def eager_attention(q, k, v, is_causal):
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return F.softmax((q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf), dim=-1) @ v


def item_beside_the_network(batch, rows, split=loop.split):
    batch[0].max().item()
    return split(batch, rows)


def with_a_break(forward: Callable) -> Callable:
    def breaks(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    return breaks


def wrapped_forward(wrap: Callable) -> AbstractContextManager:
    """Patch the forward of every MLP with `wrap(forward)`."""
    return mock.patch.object(model.MLP, "forward", wrap(model.MLP.forward))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            mock.patch.object(model.F, "scaled_dot_product_attention", eager_attention),
            id="eager attention under flash",
        ),
        pytest.param(mock.patch.object(loop, "split", item_beside_the_network), id=".item() in the step"),
        pytest.param(mock.patch.object(runtime, "set_precision", return_value=nullcontext()), id="autocast left off"),
    ],
)
def test_the_audit_finds_a_planted_fault(fault):
    with fault, pytest.raises(AssertionError):
        audit(LEVELS["flash"])


def graphs(switches: Switches) -> int:
    """Count the graphs into which Dynamo splits the network when runtime.compile_model compiles it."""
    network, compiled = build(switches), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    with mock.patch.object(network, "compile", partial(network.compile, backend=backend)):
        runtime.compile_model(network)
    with runtime.set_precision(switches.precision, CPU):
        network(random_ids(B, T), random_ids(B, T, seed=1))
    torch._dynamo.reset()
    return len(compiled)


@pytest.mark.parametrize("level", [name for name, switches in LEVELS.items() if switches.compile])
def test_a_compiled_level_is_one_graph(level):
    assert graphs(LEVELS[level]) == 1


def test_a_graph_break_is_found():
    with wrapped_forward(with_a_break), pytest.raises(Exception, match="graph_break"):
        graphs(LEVELS["compile"])


def test_a_training_reads_only_what_reading_reads():
    """Anything else, such as `.item()`, would wait for a GPU's later work too."""
    network, reading = GPT(tiny()), list[bool]()
    read = devices.Reading.read

    def noted(numbers: devices.Reading) -> list[float]:
        reading.append(True)
        return read(numbers)

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    batches = [(random_ids(B, T), random_ids(B, T, seed=1))] * 3
    for clip_norm in (None, 1.0):
        reading.clear()
        with Recorder() as recorder, mock.patch.object(devices.Reading, "read", noted):
            steps = loop.train(network, optimizer, batches, nullcontext(), CPU, B, clip_norm=clip_norm)
            assert len(list(steps)) == len(reading) == 3
            loop.evaluate(network, batches, nullcontext(), CPU, B)
            assert len(reading) == 4  # once for all batches
        assert "aten._local_scalar_dense" not in recorder.names()


@pytest.mark.parametrize(("fused", "read"), [(True, 0), (False, 3)])
def test_only_an_optimizer_that_is_not_fused_makes_the_scaler_read_in_every_step(fused, read):
    network, scaler = GPT(tiny()), runtime.make_scaler("fp16", CPU)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, fused=fused)
    batches = [(random_ids(B, T), random_ids(B, T, seed=1))] * 3
    for clip_norm in (None, 1.0):
        with Recorder() as recorder:
            autocast = runtime.set_precision("fp16", CPU)
            list(loop.train(network, optimizer, batches, autocast, CPU, B, clip_norm=clip_norm, scaler=scaler))
        assert recorder.names().count("aten._local_scalar_dense") == read


def logits_gradients(
    forward: Callable[[GPT, torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[int, list[torch.Tensor]]:
    """Return how many tensors like the logits a compiled backward fills, and the loss and the gradients."""
    network, filled = GPT(tiny(n_layer=N_LAYER)), list[bool]()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        return aot_module_simplified(graph, inputs, fw_compiler=boxed, bw_compiler=partial(boxed, tangents=True))

    def boxed(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], tangents: bool = False) -> Callable:
        sizes = [node.meta["val"].shape for node in graph.graph.nodes if node.op == "placeholder"]
        filled.extend(size[-1:] == (97,) and len(size) == 3 for size in sizes if tangents and size[:2] == (B, T))
        return make_boxed_func(graph.forward)

    network.compile(backend=backend, dynamic=False, fullgraph=True)
    loss = forward(network, random_ids(B, T), random_ids(B, T, seed=1))
    loss.backward()
    torch._dynamo.reset()
    return sum(filled), [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def test_backward_gets_no_gradient_of_the_logits(monkeypatch):
    """Logits beside the loss cost a GPU 0.5 ms for zeros of (B, T, V) at the start of backward."""
    count, values = logits_gradients(lambda network, x, y: network(x, y)[1])
    assert count == 0
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
    with_zeros, expected = logits_gradients(lambda network, x, y: network(x, y)[1])
    assert with_zeros == 1
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_the_optimizer_copies_no_parameter_or_gradient_to_the_cpu():
    network = GPT(tiny())
    optimizer = loop.make_optimizer(network, 1e-3, AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1))
    network(random_ids(B, T), random_ids(B, T, seed=1))[1].backward()
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    read = [ins for name, ins, _ in recorder.calls if name == "aten._local_scalar_dense"]
    assert len(read) == len(list(network.parameters()))  # its step counters, which are on the CPU for every device
    assert {state["step"].device for state in optimizer.state.values()} == {CPU}


def fill(network: GPT) -> None:
    """Draw large weights, so that attention is far from uniform, GELU far from linear, and no bias is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3, generator=generator)


def compile_without_inductor(network: GPT, dynamic: bool, fullgraph: bool, options: object) -> None:
    torch.nn.Module.compile(network, backend="aot_eager", dynamic=dynamic, fullgraph=fullgraph)


@pytest.mark.parametrize(
    "level", [pytest.param(name, marks=[pytest.mark.slow] * row.compile) for name, row in LEVELS.items()]
)
def test_the_benchmarked_steps_of_a_level_follow_the_gradients_of_transformers(monkeypatch, level):
    """Two rows, one at a time. SGD replaces AdamW, which would turn small differences into large ones."""
    monkeypatch.setattr(GPT, "compile", compile_without_inductor)
    params = params_with(model="tiny")
    sizes = tiny(n_layer=N_LAYER).model_dump(include=set(Size.model_fields))
    params.models["tiny"] = params.models["tiny"].model_copy(update=sizes)
    (arm,) = turns.build_arms(params, {level: LEVELS[level]}, CPU, micro_batch=1)
    fill(arm.model)
    arm = replace(arm, optimizer=torch.optim.SGD(arm.model.parameters(), lr=1.0))
    tolerance = 1e-4 if TYPES[arm.precision] == torch.float32 else 0.1  # the largest differences are 1.4e-5 and 0.024
    for seed in range(3):
        x, y = random_ids(B, T, seed=seed), random_ids(B, T, seed=seed + 10)
        reference = hub_format.to_transformers(arm.model).eval()
        F.cross_entropy(reference(x).logits.flatten(0, 1), y.flatten()).backward()
        before = {name: parameter.detach().clone() for name, parameter in arm.model.named_parameters()}
        arm.step((x, y), CPU)
        for name, parameter in arm.model.named_parameters():
            theirs = reference.get_parameter(name if name == "lm_head.weight" else f"transformer.{name}").grad
            expected = theirs.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else theirs
            difference = before[name] - parameter.detach() - expected
            assert difference.norm() < tolerance * expected.norm(), f"{name} in step {seed}"
    torch._dynamo.reset()
