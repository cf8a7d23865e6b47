"""Run one training: build it, resume it from a checkpoint, record its steps, and summarize it."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import wandb
from torch.amp import GradScaler

from gpt2_ladder import files, ledger
from gpt2_ladder.config import Environment, Shape
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.params import Params
from gpt2_ladder.running import launch, tracking
from gpt2_ladder.running.checkpoints import Checkpoints, Course, copy_weights
from gpt2_ladder.running.following import FIRST_STEPS, follow, settle
from gpt2_ladder.running.job import Job
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training import capabilities, data, devices, loop, metrics, ranks, runtime, tokenizer
from gpt2_ladder.training.metrics import Step


class Inputs(NamedTuple):
    """The files that a training reads."""

    train: Path  # the first shard to train on
    shards: Path  # folder of the other shards to train on, and their manifest
    val: Path  # the shard to validate on
    encoder_json: Path


class Start(NamedTuple):
    """Weights to begin with instead of random ones."""

    weights: Mapping[str, torch.Tensor]
    sha256: str


class Built(NamedTuple):
    """The parts of a training that are on its device, and the attention kernel that it uses."""

    device: torch.device
    model: GPT
    optimizer: torch.optim.Optimizer
    autocast: loop.Autocast
    scaler: GradScaler
    attention_kernel: str | None


def run(
    job: Job,
    params: Params,
    environment: Environment,
    inputs: Inputs,
    micro_batch: int,
    keep: Callable[[GPT], None] = lambda model: None,
    start: Start | None = None,
) -> bool:
    """Train `job` from `start`, write its steps.csv and metrics.json, and pass the trained network to `keep`.

    On each device, `micro_batch` rows of a batch go through the network at a time. Switches without effect here are
    left out, with a note. If this machine cannot train `job`, skip it and return False.
    """
    if reason := capabilities.why_skipped(job.switches, environment, params.run_slow_levels):
        job.skip(environment, reason)
        return False
    parts = job.micro_batches(micro_batch)
    note = capabilities.note_for(job.switches, environment, parts)
    job = replace(job, switches=capabilities.effective(job.switches, environment, parts))
    result: dict[str, Any] = {"status": "trained", "reason": None, "note": note}
    result |= {"environment": environment.fingerprint, "devices": job.devices}
    result |= {"start_sha256": start.sha256} if start else {}
    if launch.on_ranks(job.devices, environment.device):
        return True
    if note:
        print(f"{job.name}: {note}", flush=True)
    _run_here(job, params, environment, inputs, micro_batch, keep, start, result)
    return True


def _run_here(
    job: Job,
    params: Params,
    environment: Environment,
    inputs: Inputs,
    micro_batch: int,
    keep: Callable[[GPT], None],
    start: Start | None,
    result: dict[str, Any],
) -> None:
    """Train `job` in this process, which may be one of several ranks; complete `result` and write it."""
    shape, settings = job.shape, describe(job, params, environment)
    with ledger.phase("data"):
        corpus = data.open_shards(inputs.train, inputs.shards)
        batches = data.Batches(corpus, shape.batch_size, shape.block_size, params.seed if params.data.shuffle else None)
        validation = _open_validation(inputs, shape)
    settings |= {"start_sha256": start.sha256} if start else {}
    built, wandb_run = build_and_start_wandb(job, params, environment, micro_batch, settings)
    if start:
        copy_weights(built.model, start.weights)
    course, saved = Course(None if job.recipe.minutes and shape.steps > FIRST_STEPS else shape.steps), None
    if params.checkpoint_every:
        decisive = {**settings, "micro_batch": micro_batch, "corpus": corpus.sha256}
        trained, every = (built.model, built.optimizer, batches), params.checkpoint_every
        saved = Checkpoints(job.name, decisive, *trained, every, course, built.scaler)
    earlier, notes = saved.load() if saved else [], [result["note"]] * bool(result["note"])
    if earlier:
        micro_batch = earlier[-1].micro_batch
        notes.append(f"resumed after step {earlier[-1].step}: times and memory are those of several processes")

    def validate(step: int, rows: int) -> None:
        course.validated(step, _validate(job, built, validation[0], rows or micro_batch), built.model)

    used = partial(settle, job=job, course=course, saved=saved, resumed=len(earlier))
    new_steps = _train(job, params, built, batches, len(earlier), micro_batch, course, used)
    with Tracker(None if ranks.rank() else job.folder / "steps.csv", wandb_run, job.tokens_per_step) as tracker:
        steps = follow(chain(earlier, new_steps), tracker, job, course, validate, len(earlier), saved)
        epochs_seen = len(steps) * job.tokens_per_step / batches.tokens
        result |= {"validations": course.validations} if course.validations else {}
        result |= {"goodput": metrics.goodput(steps[len(earlier) :], job.tokens_per_step)}
        result |= _summarize(job, built, steps, course, validation, epochs_seen)
        if course.skipped:
            notes.append(f"{course.skipped} steps skipped, because float16 overflowed; compare losses up to the first")
        result["note"] = "; ".join(notes) or None
        tracker.summarize(result)
    if ranks.rank() == 0:
        files.write_json(job.folder / "metrics.json", result)
        with ledger.phase("recording"):
            keep(built.model)
        if saved:
            saved.forget()
    ranks.leave()


def build_and_start_wandb(
    job: Job, params: Params, environment: Environment, micro_batch: int, settings: Mapping[str, Any]
) -> tuple[Built, wandb.Run | None]:
    """Call `build` and, at the same time, `start_wandb`. W&B marks the run as failed if the process then fails."""
    with ThreadPoolExecutor(1) as background:
        starting = background.submit(start_wandb, job, params, settings)
        built = build(job, params, environment, micro_batch)
        with ledger.phase("recording"):
            return built, starting.result()


@ledger.phase("weights")
def build(job: Job, params: Params, environment: Environment, micro_batch: int) -> Built:
    """Open the device (each rank opens its own) and build the network and its optimizer on it.

    Raise UserError if weights, gradients and AdamW's state do not fit into memory, or without attention's kernel.
    """
    device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
    if job.devices > 1:
        device = devices.join_ranks(device, environment.threads)
    switches, config = job.switches, params.gpt(job.switches)
    if switches.allocator == "caching":
        devices.keep_freed_memory(device)
    need = count_bytes(config, 4)  # weights, gradients, AdamW's two moments
    devices.check_memory(device, need, f"training {params.model} with vocab_size {switches.vocab_size}")
    model = GPT(config, params.seed).to(device)
    if switches.compile:
        runtime.compile_model(model, switches.autotune, switches.cuda_graphs)
    size, fused = params.size, switches.fused_adamw
    optimizer = loop.make_optimizer(model, size.learning_rate, params.optimizer, fused, job.recipe.decay)
    kernel = devices.attention_kernel(config, switches.precision, micro_batch, job.shape.block_size, device)
    autocast = runtime.set_precision(switches.precision, device)
    return Built(device, model, optimizer, autocast, runtime.make_scaler(switches.precision, device), kernel)


def describe(job: Job, params: Params, environment: Environment) -> dict[str, Any]:
    """Return all settings of `job`, for W&B, and to find the checkpoints that have the same settings."""
    return {
        **job.switches.model_dump(),
        **job.recipe.model_dump(),
        **job.shape.model_dump(),
        **params.size.model_dump(),
        **params.optimizer.model_dump(),
        **{"level": job.name, "model": params.model, "machine": params.machine, "seed": params.seed},
        **{"deterministic": params.deterministic, "devices": job.devices},
        **{"data": params.data.source, "shuffle": params.data.shuffle},
        "environment": environment.model_dump(),
    }


def start_wandb(job: Job, params: Params, settings: Mapping[str, Any]) -> wandb.Run | None:
    """Start a W&B run with `settings`; on other ranks than 0, return None."""
    if os.environ.get("RANK", "0") != "0":
        return None
    environment = Environment.model_validate(settings["environment"])
    tags = [settings["model"], environment.device, settings["precision"], settings["attention"]]
    name = tracking.trial_name(params.changes) if job.name == "trial" else job.name
    group = tracking.run_group(params, environment)
    return tracking.start_run(settings, name=name, job_type=job.job_type, tags=tags, group=group)


def _train(
    job: Job,
    params: Params,
    built: Built,
    batches: data.Batches,
    first_step: int,
    micro_batch: int,
    course: Course,
    used: Callable[[int], bool],
) -> Iterator[Step]:
    """Yield the steps of `job` from `first_step` on. This rank trains on its rows of each batch."""
    count = job.tokens_per_step // (job.shape.batch_size * job.shape.block_size)
    numbers = takewhile(lambda number: number < (course.steps or job.shape.steps), itertools.count(first_step))
    rest = data.concatenate(batches, count)
    steps = (next(rest) for _ in numbers)

    def rate(step: int) -> float:
        steps, done = course.steps or job.shape.steps, step - course.skipped
        return loop.learning_rate_at(done, steps, params.size.learning_rate, job.recipe)

    return loop.train(
        ranks.average_gradients(built.model),
        built.optimizer,
        data.local_rows(steps, ranks.rank(), job.devices),
        built.autocast,
        built.device,
        micro_batch,
        first_step=first_step,
        learning_rate=rate,
        clip_norm=job.recipe.clip_norm,
        settle=used,
        may_halve=not job.switches.cuda_graphs,
        scaler=built.scaler,
    )


def _open_validation(inputs: Inputs, shape: Shape) -> tuple[list[loop.Batch], int]:
    """Return the validation batches, a pair of int64 (B, T) each, and the bytes of text in their targets."""
    shard = data.open_shard(inputs.val)
    batches = list(data.first_batches(shard, shape.eval_tokens, shape.batch_size, shape.block_size))
    return batches, tokenizer.count_bytes((y.numpy() for _, y in batches), inputs.encoder_json)


@ledger.phase("validation")
def _validate(job: Job, built: Built, batches: Sequence[loop.Batch], micro_batch: int) -> float:
    """Return the loss in nats over all `batches`. All ranks must call this together."""
    local = data.local_rows(iter(batches), ranks.rank(), job.devices)
    loss = ranks.mean(loop.evaluate(built.model, local, built.autocast, built.device, micro_batch))
    built.model.train()
    return loss


def _summarize(
    job: Job,
    built: Built,
    steps: Sequence[Step],
    course: Course,
    validation: tuple[list[loop.Batch], int],
    epochs_seen: float,
) -> dict[str, Any]:
    """Load the best weights, validate, and return metrics.MEASURED. All ranks must call this together."""
    shape, compiled = job.shape, job.switches.compile
    step_ms = metrics.median_step_ms(steps, shape.warmup_steps)
    # of the device that needed most, and read before validation, which would add to it
    allocated, reserved = (max(ranks.gather(devices.peak_memory_mib(built.device, kind))) for kind in (False, True))
    batches, text_bytes = validation
    if course.best:
        copy_weights(built.model, course.best)
    val_loss = _validate(job, built, batches, steps[-1].micro_batch)
    return {
        "parameters": sum(parameter.numel() for parameter in built.model.parameters()),
        "loss_first": steps[0].loss,
        "loss_last": steps[-1].loss,
        "skipped_steps": course.skipped,
        "val_loss": val_loss,
        "bits_per_byte": metrics.bits_per_byte(val_loss, shape.eval_tokens, text_bytes),
        "epochs_seen": epochs_seen,
        "step_ms": step_ms,
        "tokens_per_second": metrics.tokens_per_second(job.tokens_per_step, step_ms),
        "compile_seconds": metrics.compile_seconds(steps, shape.warmup_steps) if compiled else None,
        "compile_cache": runtime.compile_cache() if compiled else None,
        "peak_memory_mib": allocated,
        "peak_memory_reserved_mib": reserved,
        "micro_batch": steps[-1].micro_batch,
        "attention_kernel": built.attention_kernel,
        "float32_matmul_precision": runtime.float32_matmul_precision(),
    }
