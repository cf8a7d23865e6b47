"""Count the faults that the tests inject: `PYTHONPATH=src:. python experiments/reliability.py`.

Every row selects tests. They are run and counted, and the table is written only if all of them pass.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from experiments import pages

# fault; what it may cost, as the tests check; tests
ROWS = [
    ("SIGKILL at a random moment of a training", "the steps since its last checkpoint, which are repeated bit for bit",
     "tests/running/test_checkpoints.py -k killed_training"),
    ("SIGTERM or Ctrl-C in a step", "nothing", "tests/running/test_checkpoints.py -k signal_ends"),
    ("a checkpoint with a flipped bit, cut, replaced or half-written", "the checkpoint: refused by name, or ignored",
     "tests/running/test_checkpoints.py -k 'damaged or half_written'"),
    ("a loss or gradient that is not finite", "the steps since the last good checkpoint",
     "tests/running/test_checkpoints.py tests/stages/test_train.py -k 'not_finite or no_number'"),
    ("SIGKILL or an error while an output is replaced", "the new output; the previous one is intact",
     "tests/test_files.py -k 'kill_while or change_together or disk_is_full'"),
    ("a disk that fills up (tmpfs)", "the new output; the previous one is intact", "tests/stages/test_full_disk.py"),
    ("one download that is refused, reset, cut, slow, of a wrong length or content",
     "at most 3 tries", "tests/sources -k 'transient_failures_are or second_try'"),
    ("the same for every attempt", "the source: the next one is tried, or one line names those that failed and why",
     "tests/sources -k 'three_failures or permanent or nowhere or never_come'"),
    ("a hostile or damaged wheel, or hub", "the file: nothing outside its folder is written",
     "tests/sources -k 'wheel or no_word'"),
    ("weights with a wrong header or with NaN", "the file: refused by name",
     "tests/sources/test_hub_format.py -k 'lies or length or fit'"),
    ("W&B fails at the start, in the middle or at the end", "W&B's copy; steps.csv has every row",
     "tests/running -k 'dies or raises or cannot or without_a_network or server'"),
    ("two downloads at once, one of them killed", "nothing",
     "tests/sources/test_downloads.py -k 'at_once or the_one_that_waits'"),
    ("SIGKILL while a corpus is tokenized", "the current shard",
     "tests/sources/test_corpora.py -k while_it_tokenizes"),
    ("a corpus that is damaged or is not text", "nothing: one line names the file",
     "tests/sources/test_corpora.py -k cannot_be_read"),
    ("a rank is killed, or all are stopped", "the steps since the last checkpoint, or nothing",
     "tests/training/test_ranks.py -k 'killed_rank or sigterm'"),
    ("params.yaml, shard, weights or checkpoint damaged at random", "the file: refused with a clear message",
     "tests/test_fuzz.py -k clear_lines"),
]  # fmt: skip  # keeps a row on two lines


def count(selection: str, *options: str) -> int:
    """Run the tests of `selection` and return the number of faults: what they recorded as "tried", or 1 each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", *options, *shlex.split(selection), f"--junitxml={report}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    if result.returncode or any(case.find("skipped") is not None for case in cases):
        raise SystemExit(f"error: {shlex.join(command)}\n{result.stdout}{result.stderr}")
    tried = [case.find("properties/property[@name='tried']") for case in cases]
    return sum(1 if count is None else int(count.attrib["value"]) for count in tried)


def main() -> None:
    """Run every row and write the table into docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="damage 10,000 inputs of each reader instead of 100")
    rows = ["| fault | times | cost | `python -m pytest -n 0` |", "| --- | ---: | --- | --- |"]
    fuzz, options = ROWS[-1][-1], ["-m", "long"] if parser.parse_args().long else []
    for what, cost, selection in ROWS:
        longer = options if selection == fuzz else []
        command = f"{shlex.join(longer)} {selection}".strip()
        rows.append(f"| {what} | {count(selection, *longer):,} | {cost} | `{command}` |")
        print(rows[-1], flush=True)
    rows += ["", pages.conditions()]
    pages.put(pages.RELIABILITY, "table", "\n".join(rows))


if __name__ == "__main__":
    main()
