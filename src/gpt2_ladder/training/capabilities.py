"""Tell which switches this machine can use. Only this module and devices.py distinguish NVIDIA GPUs from CPUs."""

import platform
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

from gpt2_ladder.config import NO_EFFECT, Environment, Level, Switches, UserError
from gpt2_ladder.params import Params
from gpt2_ladder.training.precisions import PRECISIONS

# the values of switches that stand for "without this switch"
OFF = {"precision": "fp32", "allocator": "system", "autotune": False, "cuda_graphs": False}
AnySwitches = TypeVar("AnySwitches", bound=Switches)


def check_machine(machine: str, rehearsal: bool, environment: Environment) -> None:
    """Raise UserError if `machine`, which is "cpu" or "gpu" in params.yaml, is not the kind of this machine's device.

    If `rehearsal`, "gpu" is allowed on a CPU.
    """
    if machine == "cpu" and environment.device == "cuda":
        raise UserError(
            f"machine: cpu, but this machine has a GPU ({environment.device_name}): set machine: gpu in params.yaml, "
            "or hide the GPU with CUDA_VISIBLE_DEVICES=''"
        )
    on_cpu = machine == "gpu" and environment.device == "cpu"
    if on_cpu and not rehearsal:
        raise UserError(
            f"machine: gpu, but this machine has no GPU ({environment.device_name}): set machine: cpu in params.yaml, "
            "or rehearsal: true to train with the batch size and steps of `machines.gpu` on this CPU"
        )
    if rehearsal and not on_cpu:
        raise UserError("rehearsal: true is only for machine: gpu on a CPU: set rehearsal: false in params.yaml")


def with_half(params: Params, environment: Environment) -> Params:
    """Return `params` with fp16 instead of bf16 in levels and trial, if `half` says so; auto: on a GPU without bf16."""
    if params.half == "bf16" or (params.half == "auto" and (environment.bf16 or environment.device == "cpu")):
        return params
    fp16 = {"bf16": {"precision": "fp16"}}  # changes, by the precision of a row
    rows = {name: row.model_copy(update=fp16.get(row.precision)) for name, row in params.levels.items()}
    return params.model_copy(update={"levels": rows, **fp16.get(params.precision, {})})


def needs_own_process(switches: Switches, environment: Environment) -> bool:
    """Return whether `switches` change how the whole process, and so all other levels in it, gets memory."""
    return switches.allocator == "caching" and environment.device == "cpu"


def why_skipped(switches: Switches, environment: Environment, run_slow_levels: bool) -> str | None:
    """Return why this machine cannot train at `switches`, or None if it can."""
    if switches.compile and environment.compile_problem:
        return f"torch.compile cannot work here: {environment.compile_problem}"
    if switches.allocator == "caching" and environment.device == "cpu" and platform.libc_ver()[0] != "glibc":
        return "`allocator: caching` needs glibc, but this system has another C library"
    if PRECISIONS[switches.precision].operand != "bf16" or environment.bf16:
        return None
    if environment.device == "cuda":
        # torch emulates bfloat16 on older GPUs, but Inductor refuses to compile it
        needs = "torch.compile needs a GPU with compute capability 8.0 for bfloat16; set half: auto to use float16"
        return needs if switches.compile else None
    slow = "no hardware for bfloat16, so bf16 is slower than fp32; to train it, set run_slow_levels: true"
    return None if run_slow_levels else slow


def without_effect(switches: Switches, environment: Environment, micro_batches: int = 1) -> dict[str, str]:
    """Return the switches that do nothing here, and CUDA graphs if they lose gradients, each with the reason."""
    cuda, reasons = environment.device == "cuda", dict[str, str]()
    if PRECISIONS[switches.precision].float32_matmul == "tf32" and not (cuda and environment.bf16):
        too_old = "this GPU has no TF32, which needs compute capability 8.0"
        reasons["precision"] = too_old if cuda else "TF32 is a mode of NVIDIA GPUs"
    if switches.allocator == "caching" and cuda:
        reasons["allocator"] = "torch always keeps a GPU's freed memory"
    if switches.autotune and not cuda:
        reasons["autotune"] = "it chooses between kernels for GPUs"
    if switches.cuda_graphs and not cuda:
        reasons["cuda_graphs"] = "a CPU has no CUDA graphs"
    words = {name: f"has {NO_EFFECT}: {reason}" for name, reason in reasons.items()}
    if switches.cuda_graphs and cuda and micro_batches > 1:
        lost = "torch may keep the gradient of only one of them (pytorch#96693, #169545)"
        words["cuda_graphs"] = f"is left out: a step has {micro_batches} micro-batches, and {lost}"
    return {name: f"`{name}: {getattr(switches, name)}`".lower() + f" {text}" for name, text in words.items()}


def effective(switches: AnySwitches, environment: Environment, micro_batches: int = 1) -> AnySwitches:
    """Return `switches` without those that are left out on this machine: the ones to train and to measure with."""
    left_out = without_effect(switches, environment, micro_batches)
    return switches.model_copy(update={name: OFF[name] for name in left_out})


def rows_without_effect(
    levels: Mapping[str, Level], environment: Environment, micro_batches: int = 1
) -> dict[str, str]:
    """Return the speed levels that would repeat the level above on this machine, by name, each with the reason."""
    rows, here = dict[str, str](), (environment, micro_batches)
    for (_, above), (name, level) in pairwise((name, row) for name, row in levels.items() if row.group == "speed"):
        if level != above and effective(level, *here) == effective(above, *here):
            reasons = without_effect(above, *here) | without_effect(level, *here)
            rows[name] = "; ".join(reasons[key] for key in OFF if getattr(level, key) != getattr(above, key))
    return rows


def note_for(switches: Switches, environment: Environment, micro_batches: int = 1) -> str | None:
    """Return a note for the report if a switch is left out or slow on this machine, or None."""
    notes = list(without_effect(switches, environment, micro_batches).values())
    precision = PRECISIONS[switches.precision]
    if precision.operand == "bf16" and not environment.bf16:
        notes.append("no bfloat16 hardware: bf16 is emulated and slow")
    if precision.scaled and environment.device == "cpu":
        notes.append("float16 is slow on a CPU without instructions for it (avx512_fp16, amx_fp16)")
    elif precision.scaled and not switches.fused_adamw:
        notes.append("every step waits for the GPU, because without fused_adamw an overflow in float16 must be read")
    return "; ".join(notes) or None
