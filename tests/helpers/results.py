"""Invented results of a climb, in the form that the stages write."""

import datetime

from gpt2_ladder import params_yaml
from gpt2_ladder.ledger import PHASES
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import facts
from gpt2_ladder.reporting.gallery import Machine
from gpt2_ladder.training import metrics
from helpers.common import REPOSITORY, environment, measurement

PARAMS = params_yaml.load(REPOSITORY / "params.yaml")
LEVELS = dict(list(PARAMS.levels.items())[:9])  # the seed's levels
TRAINED = {
    "status": "trained",
    "reason": None,
    "note": None,
    "environment": environment().fingerprint,
    "devices": 1,
    "parameters": 124439808,
    "loss_first": 10.95,
    "skipped_steps": 0,
    "loss_last": 6.72,
    "val_loss": 7.0,
    "bits_per_byte": 3.1,
    "epochs_seen": 0.02,
    "step_ms": 1300.4,
    "tokens_per_second": 98.6,
    "goodput": 91.4,
    "compile_seconds": None,
    "compile_cache": None,
    "peak_memory_mib": 2048.0,
    "peak_memory_reserved_mib": 2100.0,
    "micro_batch": 2,
    "attention_kernel": None,
    "float32_matmul_precision": "ieee",
}
SKIPPED = {**TRAINED, "status": "skipped", "reason": "no compiler"} | dict.fromkeys(metrics.MEASURED)
RUN = measurement(
    fp32=[300.0] * 4, tf32=[300.0, 301.0, 299.0, 300.0], bf16=[150.0] * 4, compile=[120.0, 100.0, 120.0, 121.0]
)
SIX = measurement(fp32=[300.0] * 6, tf32=[300.0] * 6, bf16=[150.0] * 6, compile=[120.0] * 6)
H100 = Machine(version=1, title="H100", commit="0123456", date=datetime.date(2026, 11, 26), benchmark=SIX)
TRIAL_RUN = measurement(fp32=[300.0] * 6, trial=[150.0, 151.0, 149.0, 150.0, 150.0, 150.0])
TRIAL = {
    **TRAINED,
    "changes": {"precision": "bf16"},
    **{"loss_apart": 0.00061, "not_compared": None, "seconds": 60},
    **{"gain": TRIAL_RUN.compare("trial", "fp32", TRIAL_RUN.noise()), "not_measured": None},
    "measurement": TRIAL_RUN.model_dump(),
}
VERIFY = {"weights": "openai", "note": None, "max_abs_logit_diff": 2e-6, "max_abs_logit": 3.2}
VERIFY["random"] = dict(VERIFY)
OVERFIT = {"steps": 50, "loss_first": 10.98, "loss_last": 0.003}


def gains(run: Measurement = RUN) -> dict:
    levels, noise = {}, run.noise()
    for previous, name in zip([None, *run.levels], run.levels, strict=False):
        levels[name] = {
            **{"step_ms": run.step_ms(name)[0], "tokens_per_second": 1000.0, "tflops": 0.2, "peak_tflops": 0.4},
            "mfu": 0.5 if name != "tf32" else None,
            "over_previous": run.compare(name, previous, noise) if previous else None,
            "over_baseline": run.compare(name, "fp32", noise) if previous else None,
        }
    return {
        "environment": environment().fingerprint,
        "estimator": run.estimator,
        "rounds": 4,
        "processes": 1,
        "peak_source": "a bare matrix product in the same round",
        "control": {"ratio": 1.0, "low": 0.99, "high": 1.01},
        "levels": levels,
    }


def profiled(self_ms: dict[str, float]) -> list[dict]:
    """One level's operators, as profile.json has them, that took `self_ms`."""
    return [{"name": name, "calls": 3, "self_ms": ms} for name, ms in self_ms.items()]


OPERATORS = {
    "fp32": profiled({"aten::mm": 200.0, "aten::add": 50.0}),
    "tf32": profiled({"aten::mm": 208.0, "aten::add": 52.0}),
    "bf16": profiled({"aten::mm": 80.0, "aten::copy_": 20.0}),
    "compile": profiled({"fused by torch.compile": 60.0}),
}


PARITY = {
    "baseline": "fp32",
    "micro_batch": 2,
    "environment": environment().fingerprint,
    "levels": {name: {"largest": 0.0012, "steps": 10, "differences": [0.0, 0.0012]} for name in RUN.levels},
}


def content(weights: str = "openai", note: str | None = None, trial: dict = TRIAL, **changes: object) -> dict:
    """What the report's templates get for a climb up to `compile`; only the level bf16 has a page in docs/levels."""
    levels = changes.pop("levels", LEVELS)
    climb = {"results": dict.fromkeys(levels, TRAINED), "gains": gains(), "parity": PARITY, "profile": OPERATORS}
    climb |= {"device_time": {}, "seconds": {"download": dict.fromkeys(PHASES, 0.0) | {"imports": 1.62, "exit": 0.04}}}
    return facts.collect(
        PARAMS.model_copy(update={"levels": levels}),
        environment(),
        **climb | changes,
        trial=trial,
        verify={**VERIFY, "weights": weights, "note": note},
        reference=H100,
        overfit=OVERFIT,
        explained={"bf16"},
    )
