"""Plant cheats in a copy of the project and run the tests: `PYTHONPATH=src:. python experiments/cheats.py`.

Every row changes one piece of code so that a number looks better than it is. The tests that the row names must pass in
an unchanged copy, and one of their assertions must fail in the changed one. Only then the table is written.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from experiments import pages

ROOT = Path(__file__).parents[1]
MODEL, LOOP = "src/gpt2_ladder/model.py", "src/gpt2_ladder/training/loop.py"
DEVICES, RUN = "src/gpt2_ladder/training/devices.py", "src/gpt2_ladder/running/run.py"
GRADIENTS = "tests/test_audit.py::test_the_benchmarked_steps_of_a_level_follow_the_gradients_of_transformers"
VALIDATION = "tests/running/test_course.py::test_every_validation_is_the_loss_on_the_validation_shard"
TIMED_STEP = "tests/training/test_loop.py::test_a_timed_step_lasts_from_an_idle_gpu_to_an_idle_gpu"
TRAINING = "tests/training/test_loop.py::test_a_training_on_a_gpu_reports_times_and_losses_of_finished_steps"
BACKWARD, TOKENS = "skips a part of backward", "validates on training tokens"
CLOCK, CACHE = "times without waiting for the GPU", "reads an earlier result"


class Cheat(NamedTuple):
    """A change of one piece of code, and the test that must fail after it."""

    cheat: str
    variant: str
    test: str
    file: str
    old: str  # occurs exactly once in the file
    new: str


CHEATS = [
    Cheat(BACKWARD, "The keys of fused attention get no gradient.", GRADIENTS, MODEL,
          "attention(q, k, v, is_causal=True)", "attention(q, k.detach(), v, is_causal=True)"),
    Cheat(BACKWARD, "Only the last micro-batch has a gradient.",
          "tests/training/test_out_of_memory.py::test_accumulated_gradients_train_like_the_whole_batch", LOOP,
          "            scaler.scale(loss * share).backward()\n",
          "            if number == len(parts):\n"
          "                scaler.scale(loss * share).backward()\n"),
    Cheat(BACKWARD, "Every second step of the benchmark leaves out the MLPs.", GRADIENTS, LOOP,
          "    start = time.perf_counter()\n    train_step(",
          "    every = timed_step.__dict__['every'] = not timed_step.__dict__.get('every')\n"
          "    for block in model.h:\n"
          "        block.mlp.requires_grad_(every)\n"
          "    start = time.perf_counter()\n    train_step("),
    Cheat(TOKENS, "A training opens the training shard to validate.", VALIDATION, RUN,
          "data.open_shard(inputs.val)", "data.open_shard(inputs.train)"),
    Cheat(TOKENS, "Each validation takes the batch of the last step.", VALIDATION, RUN,
          "        course.validated(step, _validate(job, built, validation[0], rows or",
          "        last = data.Batches(corpus, shape.batch_size, shape.block_size)\n"
          "        last.position = {'epoch': 0, 'batch': max(0, step - 1)}\n"
          "        course.validated(step, _validate(job, built, [next(last)], rows or"),
    Cheat(TOKENS, "The training shard contains the validation text.",
          "tests/stages/test_tokenize_corpus.py::test_every_byte_comes_back", "pipeline/tokenize_corpus.py",
          "(TRAIN_SHARD, text[:middle])", "(TRAIN_SHARD, text)"),
    Cheat(CLOCK, "The clock of a timed step stops when the step is launched.", TIMED_STEP, LOOP,
          "    devices.synchronize(device)\n    return", "    return"),
    Cheat(CLOCK, "The clock of a timed step starts while the GPU still works.", TIMED_STEP, LOOP,
          "    devices.synchronize(device)\n    start", "    start"),
    Cheat(CLOCK, "A training reads a loss before it is computed.", TRAINING, DEVICES,
          "        self.end.wait()\n", ""),
    Cheat(CLOCK, "A training times a step from launch to launch.", TRAINING, DEVICES,
          "        if self._event and earlier._event:\n", "        if False:\n"),
    Cheat(CACHE, "A level that has a metrics.json is not trained again.",
          "tests/stages/test_train.py::test_a_stage_that_is_run_again_trains_again", "pipeline/train.py",
          "make_job(params, name), files.read_json(PROBE)\n",
          "make_job(params, name), files.read_json(PROBE)\n"
          "    if (job.folder / 'metrics.json').exists():\n"
          "        return\n"),
    Cheat(CACHE, "The benchmark repeats the rounds in benchmark.json.",
          "tests/stages/test_benchmark.py::test_every_time_in_a_benchmark_is_that_of_a_step_it_has_just_taken",
          "pipeline/benchmark.py",
          "        for result in turns.measure(",
          "        earlier = files.read_json(pipeline.BENCHMARK) if pipeline.BENCHMARK.exists() else None\n"
          "        for result in Measurement.model_validate(earlier).rounds if earlier else turns.measure("),
    Cheat(CACHE, "Nothing is verified if there is a verify.json.",
          "tests/using/test_verification.py::test_a_verification_that_is_run_again_compares_again",
          "pipeline/verify.py",
          "    params = params_yaml.load()\n",
          "    params = params_yaml.load()\n"
          "    if (RESULTS / 'verify.json').exists():\n"
          "        return\n"),
    Cheat(CACHE, "A batch that is seen again reports its first loss.",
          "tests/training/test_loop.py::test_the_losses_equal_those_of_a_loop_written_by_hand", LOOP,
          "        total += loss.detach() * share\n",
          "        total += accumulate.__dict__.setdefault(str(x.tolist()), loss.detach()) * share\n"),
    Cheat(CACHE, "A batch that is validated again keeps its loss.", VALIDATION, LOOP,
          "losses.append(forward(x, y)[1])",
          "losses.append(evaluate.__dict__.setdefault(str(x.tolist()), forward(x, y)[1]))"),
]  # fmt: skip  # keeps a row short


def copy_project(folder: Path) -> None:
    """Copy all files of the project, without those that Git ignores, to `folder`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def plant(cheat: Cheat, text: str) -> str:
    """Return the `text` of the cheat's file with the cheat in it; raise ValueError unless it has one place for it."""
    if text.count(cheat.old) != 1:
        raise ValueError(f"{cheat.file}: {cheat.old!r} occurs {text.count(cheat.old)} times")
    return text.replace(cheat.old, cheat.new)


def failure(folder: Path, test: str) -> str:
    """Run `test` in `folder` and return the line of the assertion that fails, or "" if the test passes."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--tb=line", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^.*: (assert |AssertionError|Failed: DID NOT RAISE).*$", result.stdout, re.MULTILINE)
    if (result.returncode, bool(failed)) not in ((0, False), (1, True)):
        raise SystemExit(f"error: {test} has neither passed nor failed an assertion\n{result.stdout}{result.stderr}")
    return failed[0] if failed else ""


def table() -> str:
    """Return the table of the cheats."""
    rows = ["| cheat | variant | caught by |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| {each.cheat} | {each.variant} | `{each.test}` |" for each in CHEATS)])


def main() -> None:
    """Check every row and write the table into docs/reliability.md."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_project(folder)
        for test in dict.fromkeys(cheat.test for cheat in CHEATS):
            if line := failure(folder, test):
                raise SystemExit(f"error: {test} fails without a cheat: {line}")
        for cheat in CHEATS:
            right = (folder / cheat.file).read_text()
            (folder / cheat.file).write_text(plant(cheat, right))
            line = failure(folder, cheat.test)
            (folder / cheat.file).write_text(right)
            if not line:
                raise SystemExit(f"error: {cheat.test} passes with the cheat: {cheat.variant}")
            print(f"{cheat.variant} {line}", flush=True)
    pages.put(pages.RELIABILITY, "cheats", table())


if __name__ == "__main__":
    main()
