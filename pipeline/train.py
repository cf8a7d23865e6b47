"""Train one level of the ladder: `python -m pipeline.train bf16`."""

from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Params, Recipe, Shape, Switches, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.running.checkpoints import Checkpoints
from gpt2_ladder.training import data, devices, loop, metrics, ranks, runtime, tokenizer
from pipeline import (
    ENCODER_JSON,
    PROBE,
    RESULTS,
    SHARDS,
    TRAIN_SHARD,
    VAL_SHARD,
    launch,
    read_environment,
    read_json,
    run,
    trainer,
    write_json,
)


def main(*names: str) -> None:
    params, name = params_yaml.load(), " ".join(names)
    if name not in params.levels:
        known = ", ".join(params.levels)
        raise UserError(f"level '{name}' is not in params.yaml: run python -m pipeline.train LEVEL with one of {known}")
    level = params.levels[name]
    train(params, name, "train", level, level.group, RESULTS / "levels" / name)


def train(
    params: Params,
    name: str,
    job_type: str,
    switches: Switches,
    group: Literal["quality", "speed"],
    folder: Path,
    recipe: Recipe = trainer.PLAIN,
    keep: Callable[[GPT], None] = lambda model: None,
) -> bool:
    """Train at `switches` by `recipe`, write steps.csv and metrics.json to `folder`, have `keep` keep the network.

    Where this machine cannot do it, both files say so instead, and False is returned. A speed level and the trial train
    on all `devices`; a quality level, whose few tokens are the same everywhere, on one.
    """
    environment, shape, count = read_environment(), params.shape(group), params.devices if group == "speed" else 1
    devices.check_machine(params.machine, params.rehearsal, environment)
    result: dict[str, Any] = {
        "status": "trained",
        "reason": devices.why_skipped(switches, environment, params.run_slow_levels),
        "note": devices.note_for(switches, environment),
        "environment": environment.fingerprint,
        "devices": count,
    }
    if result["reason"]:
        skip(name, folder, result)
        return False
    if launch.on_ranks(count, environment.device):
        return True
    if result["note"]:
        print(f"{name}: {result['note']}", flush=True)
    shards = data.open_shards(TRAIN_SHARD, SHARDS)
    tokens = recipe.tokens_per_step or shape.batch_size * shape.block_size
    shuffled_by = params.seed if params.data.shuffle else None
    batches = data.Batches(shards, shape.batch_size, shape.block_size, shuffled_by)
    train_batches = data.concatenate(batches, tokens // (shape.batch_size * shape.block_size))
    val_batches, val_bytes = open_validation(shape)
    micro_batch = shape.batch_size if group == "quality" else read_json(PROBE)["micro_batch"]
    device, model, optimizer = trainer.build(params, switches, environment, recipe.decay, count)
    kernel = trainer.attention_kernel(params, switches, micro_batch, shape.block_size, device)
    autocast = runtime.set_precision(switches.precision, device)
    described = trainer.describe(name, params, switches, shape, environment, recipe, count)
    saved = None
    if params.checkpoint_every:
        settings = {**described, "micro_batch": micro_batch, "corpus": shards.sha256}
        saved = Checkpoints(name, settings, model, optimizer, batches, params.checkpoint_every)
    before = saved.load() if saved else []
    if before:  # whose times and memory are those of more than one process
        notes = [result["note"], f"interrupted after step {before[-1].step} or later, and gone on from there"]
        result["note"] = "; ".join(filter(None, notes))
    new_steps = loop.train(
        ranks.average_gradients(model),
        optimizer,
        data.local_rows(islice(train_batches, shape.steps - len(before)), ranks.rank(), count),
        autocast,
        device,
        before[-1].micro_batch if before else micro_batch,
        first_step=len(before),
        learning_rate=partial(
            loop.learning_rate_at, steps=shape.steps, learning_rate=params.size.learning_rate, recipe=recipe
        ),
        clip_norm=recipe.clip_norm,
    )
    with trainer.open_tracker(job_type, described, folder / "steps.csv") as tracker:
        steps = trainer.follow(chain(before, new_steps), tracker, name, shape.steps, len(before), saved)
        step_ms = metrics.median_step_ms(steps, shape.warmup_steps)
        # of the training, before validation adds to it, on the device that needed most
        peak_memory_mib = max(ranks.gather(devices.peak_memory_mib(device)))
        own_batches = data.local_rows(iter(val_batches), ranks.rank(), count)
        val_loss = ranks.mean(loop.evaluate(model, own_batches, autocast, device, steps[-1].micro_batch))
        result |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "loss_first": steps[0].loss,
            "loss_last": steps[-1].loss,
            "val_loss": val_loss,
            "bits_per_byte": metrics.bits_per_byte(val_loss, shape.eval_tokens, val_bytes),
            "epochs_seen": shape.steps * tokens / batches.tokens,
            "step_ms": step_ms,
            "tokens_per_second": metrics.tokens_per_second(tokens, step_ms),
            "compile_seconds": metrics.compile_seconds(steps, shape.warmup_steps) if switches.compile else None,
            "compile_cache": runtime.compile_cache() if switches.compile else None,
            "peak_memory_mib": peak_memory_mib,
            "micro_batch": steps[-1].micro_batch,
            "attention_kernel": kernel,
            "float32_matmul_precision": runtime.float32_matmul_precision(),
        }
        tracker.summarize(result)
    if ranks.rank() == 0:
        write_json(folder / "metrics.json", result)
        keep(model)
        if saved:
            saved.forget()
    ranks.leave()
    return True


def skip(name: str, folder: Path, result: dict[str, Any]) -> None:
    """Say why the level is not trained here, and write files of the usual form that hold no number."""
    print(f"{name}: skipped. {result['reason']}", flush=True)
    files.write(folder / "steps.csv", metrics.HEADER)
    write_json(folder / "metrics.json", {**result, "status": "skipped"} | dict.fromkeys(metrics.MEASURED))


def open_validation(shape: Shape) -> tuple[list[loop.Batch], int]:
    """Return the batches of the validation, int64 (B, T) twice each, and how many bytes of text their targets are."""
    shard = data.open_shard(VAL_SHARD)
    batches = list(data.first_batches(shard, shape.eval_tokens, shape.batch_size, shape.block_size))
    return batches, tokenizer.count_bytes((y.numpy() for _, y in batches), ENCODER_JSON)


if __name__ == "__main__":
    run(main)
