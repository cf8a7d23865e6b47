"""Check the ladder on an NVIDIA GPU in a few minutes: `make test-gpu`, which writes gpu-report.md.

docs/gpu.md has an H200's report. `pytest -m gpu tests/test_gpu.py --rehearse` runs these tests on a CPU with the tiny
model, which only shows that the tests themselves work; test_the_gpu_tests_can_be_rehearsed does so.

Most of the time goes into compiling. So all tests share one network for each distinct graph, and start from its first
weights by copying them into it. Tests of a kernel, whose graphs no level has, use a network with one layer.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from statistics import median
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from gpt2_ladder import params_yaml
from gpt2_ladder.config import CONTROL, GPTConfig, Switches, UserError
from gpt2_ladder.measuring import cost, loss_parity, planning, profiling, step_check, summary, turns
from gpt2_ladder.measuring.gains import ESTIMATOR, Measurement
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.training import capabilities, devices, loop, runtime
from helpers.climbing import call
from helpers.common import REPOSITORY, random_ids
from helpers.memory import Capped
from pipeline import environment, probe

ROUNDS = 10
REHEARSED = ("fp32", "flash", "padded", "fused")  # compiled without Inductor, which takes 10 s for each graph
DETERMINISTIC = ("bf16", "fused")  # one level that is not compiled, and the last one without autotuning
# operators that launch a fused kernel, on CUDA and on a CPU; the math path has none of them
ATTENTION = ("_flash_attention", "_efficient_attention", "_cudnn_attention")
pytestmark = pytest.mark.filterwarnings("default")  # a new warning of a driver or profiler is no failure


class Machine:
    """The GPU under test, or the CPU that stands in for it."""

    def __init__(self, rehearsal: bool, layers: int | None = None):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at the first product
        self.rehearsal = rehearsal
        self.environment = environment.describe()
        params = capabilities.with_half(params_yaml.load(REPOSITORY / "params.yaml"), self.environment)
        small = params.machines["gpu"].model_copy(update={"batch_size": 4, "block_size": 64})
        shapes = {"gpu": small} if rehearsal else params.machines
        model = "tiny" if rehearsal else "gpt2"
        self.params: Params = params.model_copy(update={"model": model, "machine": "gpu", "machines": shapes})
        if layers:
            size = self.params.size.model_copy(update={"n_layer": layers})
            self.params = self.params.model_copy(update={"models": {model: size}})
        self.shape = self.params.shape("speed")
        self.device = devices.open_device(self.environment.device, self.environment.threads, params.seed, False)
        self.repeated = capabilities.rows_without_effect(params.levels, self.environment)
        self.levels: dict[str, Switches] = {
            name: self.acting(level)
            for name, level in params.levels.items()
            if level.group == "speed"
            and (not rehearsal or name in REHEARSED)
            and name not in self.repeated
            and capabilities.why_skipped(level, self.environment, rehearsal) is None
        }
        self.weights = turns.SharedWeights(self.params, self.device)
        self.first_weights: dict[int, dict[str, torch.Tensor]] = {}
        self.networks: dict[tuple[GPTConfig, str, bool, bool, bool], GPT] = {}

    def acting(self, level: Switches, parts: int = 1) -> Switches:
        """Return the switches that a training of `level` uses here."""
        return capabilities.effective(level, self.environment, parts)

    def batches(self, count: int) -> list[loop.Batch]:
        shape = (self.shape.batch_size, self.shape.block_size, 50257)
        return [(random_ids(*shape, seed=i), random_ids(*shape, seed=100 + i)) for i in range(count)]

    def network(self, switches: Switches) -> GPT:
        """Return the network of `switches`, the same for all switches that have the same graph."""
        config, graphs = self.params.gpt(switches), (switches.autotune, switches.cuda_graphs)
        key = config, switches.precision, switches.compile, *graphs
        if key not in self.networks:
            self.networks[key], _ = self.weights.build(config)
            if switches.compile and self.rehearsal:
                self.networks[key].compile(dynamic=False, fullgraph=True, backend="eager")
            elif switches.compile:
                runtime.compile_model(self.networks[key], *graphs)
        return self.networks[key]

    def arm(self, name: str, switches: Switches, micro_batch: int) -> Arm:
        """Return an arm; all arms share weights and optimizers, as in the benchmark."""
        _, optimizer = self.weights.build(self.params.gpt(switches), switches.fused_adamw)
        return Arm(name, self.network(switches), optimizer, switches.precision, micro_batch)

    def restart(self, switches: Switches) -> tuple[GPT, torch.optim.Optimizer]:
        """Return the network of `switches` with its first weights, and a new optimizer."""
        model, config = self.network(switches), self.params.gpt(switches)
        if config.vocab_size not in self.first_weights:
            self.first_weights[config.vocab_size] = GPT(config, self.params.seed).state_dict()
        model.load_state_dict(self.first_weights[config.vocab_size])
        settings = self.params.size.learning_rate, self.params.optimizer, switches.fused_adamw
        return model, loop.make_optimizer(model, *settings)

    def losses(self, switches: Switches, steps: int, micro_batch: int, deterministic: bool = False) -> list[float]:
        """Train from the first weights and return the losses."""
        devices.set_deterministic(deterministic)
        try:
            model, optimizer = self.restart(switches)
            autocast = runtime.set_precision(switches.precision, self.device)
            scaler, batches = runtime.make_scaler(switches.precision, self.device), self.batches(steps)
            trained = loop.train(model, optimizer, batches, autocast, self.device, micro_batch, scaler=scaler)
            return [step.loss for step in trained]
        finally:
            runtime.set_precision("fp32", self.device)
            devices.set_deterministic(False)


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest) -> Machine:
    rehearsal = request.config.getoption("--rehearse")
    if not rehearsal and environment.describe().device != "cuda":
        pytest.skip("this machine has no NVIDIA GPU; --rehearse runs this on a CPU with the tiny model")
    return Machine(rehearsal)


@pytest.fixture(scope="module")
def shallow(machine: Machine) -> Machine:
    """The machine with a network of one layer, whose graphs compile in a fraction of the time."""
    return Machine(machine.rehearsal, layers=1)


@pytest.fixture(scope="module", autouse=True)
def graphs_before() -> int:
    """The number of graphs that this process had compiled before these tests."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def micro_batch(machine: Machine) -> int:
    rows = probe.find_micro_batch(machine.params, machine.levels, machine.device)
    if rows < machine.shape.batch_size and "cuda_graphs" in machine.levels:  # left out, as in a climb
        del machine.levels["cuda_graphs"]
        machine.levels.update({name: machine.acting(level, 2) for name, level in machine.levels.items()})
    return rows


@pytest.fixture(scope="module")
def arms(machine: Machine, micro_batch: int) -> list[Arm]:
    levels = {**machine.levels, CONTROL: next(iter(machine.levels.values()))}
    made = [machine.arm(name, switches, micro_batch) for name, switches in levels.items()]
    graphs = any(switches.cuda_graphs for switches in levels.values())
    list(turns.warm_up(made, machine.batches(1)[0], machine.device, machine.params.seed, graphs))
    return made


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, machine: Machine) -> Iterator[dict[str, dict[str, str]]]:
    """The report's columns by level; written after all tests, even if some failed."""
    rows: dict[str, dict[str, str]] = {name: {} for name in [*machine.levels, "all"]}
    yield rows
    facts = [f"- {title}: {value}" for title, value in rows.pop("all").items()]
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    lines = [" | ".join(["level", *titles]), " | ".join(["---"] * (len(titles) + 1))]
    lines += [" | ".join([name, *(row.get(title, "") for title in titles)]) for name, row in rows.items()]
    rehearsal = "REHEARSAL on a CPU with the tiny model: " if machine.rehearsal else ""
    head = f"# {rehearsal}{machine.environment.device_name}"
    shape = f"{machine.shape.batch_size} x {machine.shape.block_size} tokens, {machine.environment.model_dump()}"
    path = REPOSITORY / request.config.getoption("--gpu-report")
    path.write_text("\n".join([head, "", shape, "", *(f"| {line} |" for line in lines), "", *facts]) + "\n")


@pytest.mark.gpu
def test_matrix_products_are_as_exact_as_their_precision(machine, report):
    exact = torch.randn(512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, errors = exact @ exact, {}
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        with runtime.set_precision(precision, machine.device):
            product = exact.float().to(machine.device) @ exact.float().to(machine.device)
        errors[precision] = ((product.double().cpu() - expected).abs().max() / expected.abs().max()).item()
    runtime.set_precision("fp32", machine.device)
    report["all"]["error of a product"] = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    assert errors["fp32"] < 1e-6 < 1e-3 < errors["bf16"] < 1e-2  # 24 and 8 bits
    assert 1e-5 < errors["fp16"] < errors["bf16"] / 4  # 11 bits
    if machine.rehearsal:
        assert errors["tf32"] == errors["fp32"]
    elif "tf32" not in machine.repeated:
        assert 1e-5 < errors["tf32"] < errors["bf16"]  # 11 bits


@pytest.mark.gpu
def test_gains_are_measured_and_no_level_exceeds_the_peak(machine, arms, report):
    count, seed = 6 if machine.rehearsal else ROUNDS, machine.params.seed
    names = {devices.product_precision(each.precision, machine.environment.device) for each in machine.levels.values()}
    rounds = list(turns.measure(arms, machine.batches(4), machine.device, count, 120, seed, sorted(names)))
    measurement = Measurement(
        estimator=ESTIMATOR,
        model=machine.params.model,
        batch_size=machine.shape.batch_size,
        block_size=machine.shape.block_size,
        levels=list(machine.levels),
        control=CONTROL,
        environment=machine.environment,
        rounds=rounds,
    )
    noise = measurement.noise()
    report["all"]["the baseline against itself"] = str(noise)
    peaks = cost.KNOWN_PEAKS.get(machine.environment.device_name, {})
    tokens = machine.shape.batch_size * machine.shape.block_size
    flops = tokens * cost.flops_per_token(machine.params.size, machine.shape.block_size)
    for name, switches in machine.levels.items():
        step_ms = sorted(measurement.step_ms(name))[len(rounds) // 2]
        report[name]["ms"] = f"{step_ms:,.1f}"
        reached, peak = cost.tflops(flops, step_ms), peaks.get(switches.precision)
        report[name]["TFLOP/s"] = f"{reached:,.1f}"
        report[name]["MFU"] = f"{reached / peak:.0%}" if peak else "peak unknown"
        assert peak is None or reached < peak
        products = summary.find_products(switches.precision, measurement)
        assert products is not None
        report[name]["of its own product"] = f"{reached / median(products):.0%} of {median(products):,.1f} TFLOP/s"
    for previous, name in pairwise(machine.levels):
        gain = measurement.compare(name, previous, noise)
        report[name]["over the previous level"] = f"{gain['ratio']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
    if not machine.rehearsal:
        assert abs(noise.ratio - 1) < 0.02
        if machine.environment.bf16:
            assert measurement.compare("bf16", "fp32", noise)["verdict"] == "faster"


@pytest.mark.gpu
def test_the_steps_of_every_level_are_those_of_gpt2_and_adamw(machine, arms, report):
    (batch,), settings = machine.batches(1), (machine.params.size.learning_rate, machine.params.optimizer)
    faults = {}
    for arm in arms[:-1]:  # not the control
        result = step_check.check(arm, batch, machine.device, *settings)
        report[arm.name]["gradient differs"] = f"{result.gradient:.1e} ({result.gradient_of})"
        faults[arm.name] = result.fault(arm.precision)
    assert faults == dict.fromkeys(machine.levels)


@pytest.mark.gpu
def test_memory_is_what_the_plan_predicts(machine, arms, micro_batch, report):
    for arm in arms[:-1]:
        switches, network = machine.levels[arm.name], machine.params.gpt(machine.levels[arm.name])
        arm.optimizer.zero_grad()
        devices.reset_peak_memory(machine.device)
        before = devices.peak_memory_mib(machine.device)
        arm.step(machine.batches(1)[0], machine.device)
        measured = devices.peak_memory_mib(machine.device)
        cuda = devices.allocates_like_cuda(machine.device)
        rows, pieces = micro_batch, 1 if micro_batch == machine.shape.batch_size else 2
        block_size = machine.shape.block_size
        step = planning.trace_step(network, switches.precision, rows, block_size, cuda, pieces)
        # the weights of all arms are allocated before, so only the growth counts
        weights_mib = 12 * sum(parameter.numel() for parameter in arm.model.parameters()) / 2**20
        predicted = before + step.peak_bytes / 2**20 - weights_mib
        reserved = devices.peak_memory_mib(machine.device, reserved=True)
        report[arm.name]["peak MiB, predicted, reserved"] = f"{measured:,.0f}, {predicted:,.0f}, {reserved:,.0f}"
        if not machine.rehearsal and not switches.cuda_graphs:  # their memory is allocated once, when they are recorded
            assert measured < 1.05 * predicted
            assert switches.compile or measured > 0.9 * predicted


@pytest.mark.gpu
def test_only_flash_levels_run_a_fused_attention_kernel(machine, arms, report, tmp_path):
    for arm in arms[:-1]:
        step = partial(arm.step, machine.batches(1)[0], machine.device)
        operators = profiling.profile_step(step, tmp_path / f"{arm.name}.json.gz")
        attention = {operator.name for operator in operators if any(word in operator.name for word in ATTENTION)}
        report[arm.name]["costliest"] = ", ".join(
            f"{operator.name} {operator.self_ms:,.1f} ms" for operator in operators[:4]
        )
        report[arm.name]["attention"] = ", ".join(sorted(attention)) or "written out"
        switches = machine.levels[arm.name]
        assert switches.cuda_graphs or bool(attention) == (switches.attention == "flash")  # a replay has no operators


@pytest.mark.gpu
def test_every_level_has_the_losses_of_the_baseline(machine, micro_batch, report):
    steps, names = 5, list(machine.levels)
    baseline = machine.losses(machine.levels[names[0]], steps, micro_batch)
    for name in names[1:]:
        level = machine.levels[name]
        expected = loss_parity.padding_cost(level.vocab_size, machine.levels[names[0]].vocab_size)
        losses, tolerance = machine.losses(level, steps, micro_batch), getattr(machine.params.parity, level.precision)
        parity = loss_parity.compare(name, losses, baseline, tolerance, steps, expected)
        report[name]["largest difference of the loss"] = f"{parity.largest:.6f}"


@pytest.mark.gpu
def test_no_operation_of_a_step_waits_for_the_gpu(machine, arms):
    for arm in arms[:-1]:
        batch = tuple(ids.to(machine.device) for ids in machine.batches(1)[0])
        autocast = runtime.set_precision(arm.precision, machine.device)
        try:
            if not machine.rehearsal:
                torch.cuda.set_sync_debug_mode("error")
            arm.optimizer.zero_grad()  # the next replay overwrites the gradients of this one
            loop.accumulate(arm.model, batch, autocast, machine.device, arm.micro_batch)
            arm.optimizer.step()
        finally:
            if not machine.rehearsal:
                torch.cuda.set_sync_debug_mode("default")
            runtime.set_precision("fp32", machine.device)


@pytest.mark.gpu
def test_deterministic_runs_have_the_same_bits(machine, micro_batch, report):
    for name, level in ((name, machine.levels[name]) for name in DETERMINISTIC if name in machine.levels):
        runs = {
            setting: [machine.losses(level, 2, micro_batch, setting) for _ in range(2)] for setting in (True, False)
        }
        report[name]["same bits with and without deterministic"] = ", ".join(str(a == b) for a, b in runs.values())
        assert runs[True][0] == runs[True][1]


# The three tests below were written without a GPU. A rehearsal only shows that they run; on a CPU nothing is recorded.


@pytest.mark.gpu
def test_every_step_after_the_warm_up_replays_its_cuda_graphs(machine, arms, report):
    """Also if two arms with graphs share their weights, and other arms step between them."""
    replay, capture = torch.cuda.CUDAGraph.replay, torch.cuda.CUDAGraph.capture_begin
    for batch in machine.batches(2):
        for arm in arms:
            with (
                mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=replay) as replayed,
                mock.patch.object(
                    torch.cuda.CUDAGraph, "capture_begin", autospec=True, side_effect=capture
                ) as recorded,
            ):
                turns.step_as_compiled(arm, batch, machine.device)
            expects = arm.name in machine.levels and machine.levels[arm.name].cuda_graphs
            report["all"][f"graphs replayed in a step of {arm.name}"] = str(replayed.call_count)
            assert (replayed.call_count >= 2) if expects else (replayed.call_count == 0)  # forward and backward
            assert recorded.call_count == 0


@pytest.mark.gpu
def test_gradients_have_the_same_bits_with_and_without_cuda_graphs(shallow, micro_batch, report):
    """The graphs are used from the third step on. With several micro-batches they are left out."""
    level, rows = shallow.params.levels["cuda_graphs"], shallow.shape.batch_size
    if rows > micro_batch or capabilities.why_skipped(level, shallow.environment, shallow.rehearsal):
        return
    level = level.model_copy(update={"autotune": False})  # it may choose other kernels for the second network
    acting, gradients = shallow.acting(level), []
    assert acting.cuda_graphs == (not shallow.rehearsal)
    assert not shallow.acting(level, 2).cuda_graphs
    devices.set_deterministic(True)
    try:
        for switches in (acting, acting.model_copy(update={"cuda_graphs": False})):
            model, optimizer = shallow.restart(switches)
            autocast = runtime.set_precision(switches.precision, shallow.device)
            for batch in shallow.batches(4):
                loop.train_step(model, optimizer, batch, autocast, shallow.device, rows)
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    finally:
        runtime.set_precision("fp32", shallow.device)
        devices.set_deterministic(False)
    differ = [name for name, gradient in gradients[0].items() if not torch.equal(gradient, gradients[1][name])]
    report["all"]["gradients that differ with CUDA graphs"] = str(len(differ))
    assert differ == []


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["cudnn", "efficient"])
def test_a_named_attention_kernel_runs_alone_or_is_refused(shallow, micro_batch, report, tmp_path, attention):
    switches = shallow.levels["flash"].model_copy(update={"attention": attention})
    network = shallow.params.gpt(switches)
    try:
        devices.attention_kernel(network, switches.precision, micro_batch, shallow.shape.block_size, shallow.device)
    except UserError as error:
        report["all"][f"attention: {attention}"] = str(error)
        assert shallow.rehearsal or "H100" not in shallow.environment.device_name
        return
    arm, batch = shallow.arm(attention, switches, micro_batch), shallow.batches(1)[0]
    list(turns.warm_up([arm], batch, shallow.device, 0))
    step = partial(arm.step, batch, shallow.device)
    operators = profiling.profile_step(step, tmp_path / "trace.json.gz")
    used = {word for word in ATTENTION if any(word in operator.name for operator in operators)}
    report["all"][f"attention: {attention}"] = ", ".join(sorted(used))
    assert used == {f"_{attention}_attention"}


@contextmanager
def little_memory(machine: Machine, share: float) -> Iterator[None]:
    """Limit free memory to `share` of what a step with the whole batch needs."""
    switches = machine.levels["fp32"]
    shape, cuda = (machine.shape.batch_size, machine.shape.block_size), devices.allocates_like_cuda(machine.device)
    step = planning.trace_step(machine.params.gpt(switches), switches.precision, *shape, cuda)
    if machine.rehearsal:
        with Capped(step.peak_bytes * share):
            yield
        return
    devices.reset_peak_memory(machine.device)
    _, total = torch.cuda.mem_get_info()
    fraction = (torch.cuda.memory_allocated() + step.peak_bytes * share) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))  # a small card may have less already
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_is_halved_with_the_same_loss(machine, report, capsys):
    fp32 = machine.levels["fp32"]
    with little_memory(machine, 0.7):
        halved = machine.losses(fp32, 3, machine.shape.batch_size)
    assert "out of memory" in capsys.readouterr().out
    expected = machine.losses(fp32, 3, machine.shape.batch_size // 2)
    difference = max(abs(a - b) for a, b in zip(halved, expected, strict=True))
    report["all"]["out of memory"] = f"halved; the loss differs by {difference:.1e}"
    assert halved == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
def test_each_distinct_graph_was_compiled_once(machine, shallow, graphs_before, report):
    """In the tests above, of which some may not have run. `deterministic: true` makes another graph."""
    repeated = [machine.levels[name] for name in DETERMINISTIC if name in machine.levels]
    networks = [key for each in (machine, shallow) for key in each.networks]
    distinct = sum(compiled for _, _, compiled, *_ in networks) + sum(level.compile for level in repeated)
    compiled = counters["stats"]["unique_graphs"] - graphs_before
    report["all"]["graphs compiled"] = f"{compiled}, distinct {distinct}"
    assert compiled <= distinct


@pytest.mark.slow
def test_the_gpu_tests_can_be_rehearsed(tmp_path):
    path = tmp_path / "gpu-report.md"
    options = "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", __file__, "--rehearse", "--gpu-report", str(path)
    assert "skipped" not in call(REPOSITORY, "python", "-m", "pytest", *options)
    written = path.read_text()
    assert written.startswith("# REHEARSAL on a CPU")
    assert "- graphs compiled: 4, distinct 4" in written  # flash; padded; fused, deterministic; one layer
    for name in ("fp32", "flash"):
        (row,) = [line for line in written.splitlines() if line.startswith(f"| {name} |")]
        assert all(cell.strip() for cell in row.strip("|").split("|")[1:4])
