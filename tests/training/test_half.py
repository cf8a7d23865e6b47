"""Training in float16: which machines do it, and what happens to a step whose gradient overflows."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.amp import GradScaler

from gpt2_ladder.config import AdamW, Switches, UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.measuring import trials, turns
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.training import capabilities, devices, loop, runtime
from gpt2_ladder.training.precisions import PRECISIONS
from helpers.common import environment, params_with, random_ids, tiny
from helpers.trainings import train
from pipeline import ENVIRONMENT, PROBE, probe, read_settings

CPU = torch.device("cpu")
SETTINGS = AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
BATCH = random_ids(), random_ids(seed=1)
LARGE = 2.0**20  # as the first scale of the loss, it overflows float16 in the first steps


def fp16(params: Params, fused: bool = True, **recipe: object) -> Params:
    """Return the settings of a trial in float16."""
    switches = {"precision": "fp16", "fused_adamw": fused}
    return Params.model_validate(params.model_dump() | switches | {"recipe": params.recipe.model_dump() | recipe})


def written(name: str) -> str:
    return Path("results", name).read_text()


def norms() -> list[float]:
    return [float(line.split(",")[4]) for line in written("steps.csv").splitlines()[1:]]


@pytest.fixture
def first_scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The scale with which every scaler starts."""
    scale = [LARGE]
    monkeypatch.setattr(runtime, "make_scaler", lambda *_: GradScaler("cpu", init_scale=scale[0], growth_interval=3))
    return scale


@pytest.mark.parametrize(
    ("half", "machine", "expected"),
    [
        ("auto", environment(), "bf16"),
        ("auto", environment(bf16=False), "bf16"),  # skipped, as without `half`
        ("auto", environment(device="cuda"), "bf16"),
        ("auto", environment(device="cuda", bf16=False), "fp16"),
        ("fp16", environment(), "fp16"),
        ("bf16", environment(device="cuda", bf16=False), "bf16"),
    ],
)
def test_half_decides_what_bf16_means_in_levels_and_trial(params, monkeypatch, half, machine, expected):
    written = params_with(half=half, precision="bf16")
    monkeypatch.setattr("pipeline.params_yaml.load", lambda: written)
    write_json(ENVIRONMENT, machine.model_dump())
    settings, read = read_settings()
    assert read == machine
    assert [settings.precision, settings.levels["bf16"].precision, settings.levels["fused"].precision] == 3 * [expected]
    for name, level in settings.levels.items():
        changed = {"precision"} if written.levels[name].precision == "bf16" else set()
        assert level.model_dump(exclude=changed) == written.levels[name].model_dump(exclude=changed)
    if expected == "bf16":
        assert settings == written


def test_a_precision_that_names_fp16_or_another_type_stays(params):
    for precision, half in (("fp16", "bf16"), ("tf32", "fp16"), ("fp32", "fp16")):
        assert capabilities.with_half(params_with(precision=precision, half=half), environment()).precision == precision


def test_an_old_gpu_trains_compiled_in_fp16_and_a_cpu_gets_a_note():
    def half(**changes: object) -> Switches:
        return params_with(precision="fp16", **changes).switches

    old_gpu, old_cpu = environment(device="cuda", bf16=False), environment(bf16=False)
    for machine in (old_gpu, old_cpu):
        assert capabilities.why_skipped(half(compile=True), machine, False) is None
    fused, plain = half(fused_adamw=True), half()
    assert capabilities.note_for(fused, old_gpu) is None
    assert "every step waits for the GPU" in (capabilities.note_for(plain, old_gpu) or "")
    for switches in (fused, plain):
        assert "float16 is slow on a CPU without" in (capabilities.note_for(switches, old_cpu) or "")


def state(model: GPT, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return a copy of the weights and of AdamW's state, which the first step creates."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *values)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_whose_gradient_overflows_changes_nothing(fused, clip_norm):
    model, scaler, autocast = GPT(tiny()), GradScaler("cpu", init_scale=LARGE), runtime.set_precision("fp16", CPU)
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS, fused)
    how = {"clip_norm": clip_norm, "scaler": scaler, "settle": lambda _: True}
    before, kept, count = state(model, optimizer), [], len(list(model.parameters()))
    for step in loop.train(model, optimizer, 12 * [BATCH], autocast, CPU, 2, **how):
        after = state(model, optimizer)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=False)]  # the first step makes state
        kept.append(all(same[:count]))
        assert kept[-1] == (not math.isfinite(step.grad_norm))
        assert not kept[-1] or all(same)
        before = after
    assert kept[:2] == [True, True]
    assert not all(kept)
    assert scaler.get_scale() == LARGE / 2 ** sum(kept)


def test_the_recorded_norm_and_the_clipped_gradient_are_not_scaled():
    records = []
    for precision in ("fp32", "fp16"):
        for clip_norm in (None, 0.1):
            model, scaler = GPT(tiny()), runtime.make_scaler(precision, CPU)
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the weights move by the gradient
            how = {"clip_norm": clip_norm, "scaler": scaler}
            (step,) = loop.train(model, optimizer, [BATCH], runtime.set_precision(precision, CPU), CPU, 1, **how)
            moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
            records.append((step.loss, step.grad_norm, moved.norm().item()))
    plain, clipped, half, half_clipped = records
    assert half == pytest.approx(plain, rel=1e-3)
    assert half_clipped == pytest.approx(clipped, rel=1e-3)
    assert half_clipped[2] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_counted_and_do_not_advance_the_schedule(params, monkeypatch, first_scale, fused):
    rates, rate = [], loop.learning_rate_at
    monkeypatch.setattr(loop, "learning_rate_at", lambda step, *rest: rates.append(step) or rate(step, *rest))
    assert train(fp16(params, fused).model_copy(update={"checkpoint_every": None}))
    taken = [math.isfinite(norm) for norm in norms()]
    assert taken[:2] == [False, False]
    assert rates[::2] == [sum(taken[:index]) for index in range(12)]
    result = json.loads(written("metrics.json"))
    assert result["skipped_steps"] == taken.count(False) < 8
    assert f"{result['skipped_steps']} steps skipped, because float16 overflowed" in result["note"]
    first_scale[0] = 1024.0
    train(fp16(params))
    result = json.loads(written("metrics.json"))
    assert result["skipped_steps"] == 0
    assert "skipped" not in result["note"]


def test_without_a_schedule_a_step_is_launched_before_the_last_one_is_read(params, monkeypatch, first_scale):
    """Only the next learning rate needs to know whether the last step was skipped."""
    events, step, read = [], loop.train_step, devices.Reading.read
    monkeypatch.setattr(loop, "train_step", lambda *args: events.append("launch") or step(*args))
    monkeypatch.setattr(devices.Reading, "read", lambda reading: events.append("read") or read(reading))
    for schedule, expected in (("cosine", ["launch", "read", "launch"]), ("constant", ["launch", "launch", "read"])):
        events.clear()
        train(fp16(params.model_copy(update={"checkpoint_every": None}), schedule=schedule, lr_warmup_steps=0))
        assert events[:3] == expected


def test_eight_overflows_in_a_row_stop_the_training_with_one_line(params, first_scale):
    first_scale[0] = float("inf")
    with pytest.raises(UserError) as caught:
        train(fp16(params).model_copy(update={"checkpoint_every": None}))
    message = (
        r"trial: at step 7 the loss is [\d.]+ and the gradient's norm (nan|inf) in float16 \(8 steps skipped\); use "
    )
    assert re.fullmatch(
        message + r"precision: fp32, or lower models\.\*\.learning_rate in params\.yaml", str(caught.value)
    )
    assert len(norms()) == 8
    assert not Path("results/metrics.json").exists()


def test_seven_overflows_in_a_row_do_not(params, monkeypatch, first_scale):
    first_scale[0], step, calls = 1024.0, loop.train_step, []

    def train_step(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        loss, norm = step(*args)
        return loss, norm * (float("nan") if len(calls) in {*range(1, 8), 9} else 1.0)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert train(fp16(params))
    assert json.loads(written("metrics.json"))["skipped_steps"] == 8


def test_a_loss_that_is_not_finite_stops_a_training_in_fp16_too(params, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *_: (torch.tensor(float("inf")), torch.tensor(1.0)))
    with pytest.raises(UserError, match="trial: at step 0 the loss is inf"):
        train(fp16(params))


def test_every_measured_arm_has_the_scaler_of_its_precision():
    params = params_with(model="tiny")
    levels = {name: params.levels["fp32"].model_copy(update={"precision": name}) for name in PRECISIONS}
    arms = turns.build_arms(params, levels | {"again": levels["fp16"]}, CPU, 2)
    assert [arm.name for arm in arms if arm.scaler.is_enabled()] == ["fp16", "again"]
    assert arms[-1].scaler is not arms[-2].scaler
    ids = random_ids(vocab_size=50257)
    for arm in arms[-2:]:
        arm.step((ids, ids), CPU)
    assert [arm.scaler.get_scale() for arm in arms[-2:]] == 2 * [2.0**16]
    trial = trials.follow_recipe(arms[-1], fp16(params, clip_norm=1.0))
    assert trial.scaler is arms[-1].scaler


def test_the_probe_takes_its_step_with_a_scaler(monkeypatch):
    seen, params = [], params_with(model="tiny")
    monkeypatch.setattr(loop, "timed_step", lambda *step: seen.append(step[6].is_enabled()))
    levels = {name: params.levels["fp32"].model_copy(update={"precision": name}) for name in ("fp32", "bf16", "fp16")}
    probe.find_micro_batch(params, levels, CPU)
    assert sorted(seen) == [False] * 3 + [True]  # one precision is tried twice: weights come first
    assert PROBE.name == "probe.json"
