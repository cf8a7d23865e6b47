"""The gain of each switch first and last: which arms a machine measures, in which blocks, and what the page shows."""

import json
import math
import re

import pytest

from experiments import attribution
from experiments.attribution import BASELINE, FULL, INTERACTIONS, MOST_ARMS, Attribution
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.gains import Round
from gpt2_ladder.training import capabilities
from helpers.common import REPOSITORY, environment, params_with

GPU = environment(device="cuda", device_name="A GPU")
T4 = environment(device="cuda", device_name="A T4", bf16=False)
MACHINES = pytest.mark.parametrize("machine", [environment(), GPU, T4], ids=["cpu", "gpu", "t4"])


def plan_for(machine=None, micro_batches=1, **changes) -> attribution.Plan:
    machine = machine or environment()
    return attribution.make_plan(capabilities.with_half(params_with(**changes), machine), machine, micro_batches)


def report(**step_ms: float) -> Attribution:
    """Return a measurement of a CPU in which `step_ms` gives the time of some arms; the others take 100 ms."""
    plan, blocks = plan_for(), []
    for names in attribution.make_blocks([*plan.arms]):
        times = {name: step_ms.get(name.replace(" + ", "_").replace(" ", "_"), 100.0) for name in names}
        blocks.append([Round(order=names, step_ms=times, matmul_tflops={})] * 6)
    about = {"model": "tiny", "batch_size": 2, "block_size": 256, "environment": environment()}
    return Attribution(**about, plan=plan, blocks=blocks)


def test_a_cpu_leaves_out_what_has_no_effect_there_and_the_allocator():
    plan = plan_for()
    assert list(plan.left_out) == ["tf32", "allocator", "autotune", "cuda_graphs"]
    assert plan.left_out["tf32"] == "`precision: tf32` has no effect on this device: TF32 is a mode of NVIDIA GPUs"
    assert plan.left_out["allocator"].startswith("`allocator: caching` changes how the whole process, ")
    measured = ["bf16", "compile", "flash", "padded", "fused", "chunked"]
    places = {f"{place} {name}" for place in ("first", "last") for name in measured}
    assert {*plan.arms} == {BASELINE, FULL, "control", *places, "compile + flash", "bf16 + compile", "compile + padded"}
    full = plan.arms[FULL]
    assert (full.precision, full.chunked_loss, full.allocator, full.autotune) == ("bf16", True, "system", False)


def test_a_gpu_measures_tf32_only_first_and_what_needs_compile_only_last():
    plan = plan_for(GPU)
    assert list(plan.left_out) == ["allocator"]
    assert {"first tf32", "last autotune", "last cuda_graphs"} <= plan.arms.keys()
    assert {"last tf32", "first autotune", "first cuda_graphs"} & plan.arms.keys() == set()
    without_compile = plan.arms["last compile"]
    assert (without_compile.autotune, without_compile.cuda_graphs) == (False, False)
    assert (without_compile.precision, without_compile.fused_adamw) == ("bf16", True)
    assert plan.arms["last cuda_graphs"].autotune
    assert list(plan_for(GPU, micro_batches=2).left_out) == ["allocator", "cuda_graphs"]


def test_a_gpu_without_bfloat16_measures_float16_instead():
    plan = plan_for(T4)
    assert {plan.arms[name].precision for name in (FULL, "first bf16", "bf16 + compile")} == {"fp16"}
    assert plan.changes["bf16"] == "precision: fp16"
    assert list(plan.left_out) == ["tf32", "allocator"]


@MACHINES
def test_an_arm_differs_from_the_baseline_or_the_full_set_in_one_switch(machine):
    plan = plan_for(machine)
    for name, switches in plan.arms.items():
        other = plan.arms[FULL if name.startswith("last") else BASELINE]
        changed = {key for key, value in switches if value != getattr(other, key)}
        if name.startswith(("first", "last")):
            assert len(changed - ({"autotune", "cuda_graphs"} if name == "last compile" else set())) == 1, name


@MACHINES
def test_every_block_has_the_baseline_and_the_full_set_and_an_interaction_is_in_one(machine):
    arms = [*plan_for(machine).arms]
    blocks = attribution.make_blocks(arms)
    assert all({BASELINE, FULL} <= {*block} and len({*block}) == len(block) <= MOST_ARMS for block in blocks)
    assert {arm for block in blocks for arm in block} == {*arms}
    for a, b in INTERACTIONS:
        assert any({BASELINE, f"first {a}", f"first {b}", f"{a} + {b}"} <= {*block} for block in blocks)


def test_an_interaction_above_one_means_that_both_gain_more_together():
    # alone 100 / 80 and 100 / 50; together 100 / 32: 1.25 times the product of both
    measured = report(first_compile=80.0, first_flash=50.0, compile_flash=32.0, bf16_compile=100.0)
    ratios = {pair: gain.ratio for pair, gain in measured.interactions().items()}
    assert ratios == pytest.approx(
        {("compile", "flash"): 1.25, ("bf16", "compile"): 0.8, ("compile", "padded"): 80 / 100}
    )


def test_first_is_over_the_baseline_and_last_over_the_full_set_without_the_switch():
    measured = report(fp32=200.0, full=25.0, first_fused=160.0, last_fused=50.0, control=200.0)
    row = measured.switches()["fused"]
    assert (row["first"].ratio, row["last"].ratio) == pytest.approx((1.25, 2.0))
    text = attribution.part("a-machine", measured)
    assert "| 1.25 [1.25, 1.25] | 2.00 [2.00, 2.00] |" in re.sub(" +", " ", text)
    assert "- Not measured: `allocator: caching` changes how the whole process" in text
    assert "`fp32`, in each block: 8.00 [8.00, 8.00], 8.00 [8.00, 8.00]." in " ".join(text.split())
    assert "1.00 [1.00, 1.00]* |" in attribution.part("a-machine", report())  # every arm takes 100 ms
    assert attribution.draw("a-machine", measured).startswith("<svg")


def test_a_switch_without_a_place_says_why():
    plan, cpu = plan_for(GPU), report()
    blocks = [
        [Round(order=names, step_ms=dict.fromkeys(names, 100.0), matmul_tflops={})] * 6
        for names in attribution.make_blocks([*plan.arms])
    ]
    text = attribution.part("gpu", cpu.model_copy(update={"plan": plan, "blocks": blocks}))
    assert [line.count("needs `compile`") for line in text.splitlines() if "`autotune" in line] == [1]
    assert [line.count("not in the full set") for line in text.splitlines() if "`tf32" in line] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.clear(), "model: Field required"),
        (lambda content: content.update(speed=1), "speed: Extra inputs are not permitted"),
        (lambda content: content["blocks"][0].pop(), "content: Value error, every block needs 6 rounds"),
        (lambda content: content["blocks"].clear(), "every block needs 6 rounds"),
        (lambda content: content["blocks"].pop(), "the same other arms of the plan"),
        (lambda content: content["blocks"][1][2]["step_ms"].pop(FULL), "every round of a block needs fp32, full"),
        (lambda content: content["blocks"][1][2]["step_ms"].pop("last flash"), "the same other arms of the plan"),
        (lambda content: content["blocks"][0][0]["step_ms"].update(full=0.0), "rounds with positive times"),
    ],
)
def test_a_file_with_a_mistake_is_refused_in_one_line(change, message, tmp_path):
    content, path = json.loads(report().model_dump_json()), tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert attribution.read(path) == report()
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        attribution.read(path)
    assert str(refused.value).startswith(f"{path}: not a measurement: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "results/x.json"], "run results/x.json: give a name of small letters, digits and -"),
        (["run", "x"], "run x: give a name"),
        (["run", "x.json", "--rounds", "5"], "--rounds 5: too few for an interval; use at least 6"),
        (["run", "x.json", "--rounds", "many"], "argument --rounds: invalid int value: 'many'; for all options, run "),
        (["measure"], "invalid choice: 'measure'"),
        ([], "the following arguments are required"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(attribution, "measure", lambda *_: pytest.fail("the measurement started"))
    with pytest.raises(UserError) as refused:
        attribution.main(*arguments)
    assert message in str(refused.value)


def test_a_machine_that_cannot_train_the_full_set_is_refused():
    with pytest.raises(UserError, match=r"the full set: torch.compile cannot work here: no compiler"):
        plan_for(environment(compile_problem="no compiler"))
    with pytest.raises(UserError, match="set run_slow_levels: true"):
        plan_for(environment(bf16=False))
    assert plan_for(environment(bf16=False), run_slow_levels=True).arms[FULL].precision == "bf16"


def test_a_measurement_takes_all_rounds_of_every_block_and_writes_them(params, monkeypatch, capsys):
    monkeypatch.setattr(attribution, "MOST_ARMS", 4)
    base = params.levels[BASELINE]  # without compilation, which takes seconds
    rows = {BASELINE: base, "flash": base.model_copy(update={"attention": "flash"})}
    changed = params.model_copy(update={"levels": rows})
    monkeypatch.setattr(attribution, "read_settings", lambda: (changed, environment()))
    attribution.main("run", "a-machine.json", "--rounds", "6")
    measured = attribution.read(attribution.FOLDER / "a-machine.json")
    blocks = [["control", "first flash", BASELINE, FULL], [BASELINE, FULL, "last flash"]]
    assert [sorted(block[0].step_ms) for block in measured.blocks] == blocks
    assert [len(block) for block in measured.blocks] == [6, 6]
    assert all(math.isfinite(row["first"].ratio) for row in measured.switches().values())
    printed = capsys.readouterr().out
    assert printed.startswith("attribution: 5 arms in 2 blocks, 6 rounds, ")
    assert "attribution: block 2, round 6/6, ms per step: fp32 " in printed


def test_writing_again_would_change_nothing(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for path, text in attribution.contents().items():
        assert path.read_text() == text, f"{path} is not current: run python -m experiments.attribution write"
