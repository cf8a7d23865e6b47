"""What was tried against a climb, how often, and what it cost. `PYTHONPATH=src:. python experiments/reliability.py`.

Every row is a choice of tests: they are run here and counted, and the table is written only if all of them pass.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from experiments import pages
from pipeline import environment

# what was tried; what it may cost, which the tests compare; which tests
ROWS = [
    ("SIGKILL at a random moment of a training", "the steps since its last checkpoint, taken again with the same bits",
     "tests/running/test_checkpoints.py -k fifty_random"),
    ("SIGTERM or Ctrl-C in a step", "nothing", "tests/running/test_checkpoints.py -k signal_ends"),
    ("a checkpoint flipped, cut, gone or half-written", "the checkpoint: refused by its name, or passed over",
     "tests/running/test_checkpoints.py -k 'damaged or being_written'"),
    ("a loss or gradient that is no number", "the steps since the last good checkpoint",
     "tests/running/test_checkpoints.py tests/stages/test_train.py -k no_number"),
    ("SIGKILL or an error while an output is replaced", "the new output; the one of before is whole",
     "tests/test_files.py -k 'kill_while or change_together or disk_is_full'"),
    ("a disk that fills up (tmpfs)", "the new output; the one of before is whole", "tests/stages/test_full_disk.py"),
    ("a download that is refused, reset, cut, slow, of another length or flipped, once",
     "at most 3 tries", "tests/sources -k 'transient_failures_are or second_try'"),
    ("the same, for good", "the source: the next one is asked, or one line says which failed, and why",
     "tests/sources -k 'three_failures or permanent or nowhere or never_come'"),
    ("a hostile or damaged wheel, or hub", "the file: nothing outside its folder is written",
     "tests/sources -k 'wheel or no_word'"),
    ("weights whose header lies, or that hold NaN", "the file: refused by its name",
     "tests/sources/test_hub_format.py -k 'lies or length or fit'"),
    ("W&B failing at the start, in the middle or at the end", "W&B's copy; steps.csv has every row",
     "tests/running -k 'dies or raises or cannot or without_a_network or server'"),
    ("two downloads at once, one of them killed", "nothing",
     "tests/sources/test_downloads.py -k 'at_once or the_one_that_waits'"),
    ("SIGKILL to the tokenizing of a corpus", "the shard that it was at",
     "tests/sources/test_corpora.py -k while_it_tokenizes"),
    ("a corpus that is damaged, or no text", "nothing: one line names the file",
     "tests/sources/test_corpora.py -k cannot_be_read"),
    ("a rank killed, or all told to stop", "the steps since the last checkpoint, or nothing",
     "tests/training/test_ranks.py -k 'killed_rank or sigterm'"),
    ("params.yaml, shard, weights or checkpoint damaged at random", "the file: refused in clear lines",
     "tests/test_fuzz.py -k clear_lines"),
]  # fmt: skip  # so that a row is not five lines


def count(selection: str, *options: str) -> int:
    """Run the tests of `selection`; return how much they tried: what they recorded as "tried", or 1 each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", *options, *shlex.split(selection), f"--junitxml={report}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    if result.returncode or any(case.find("skipped") is not None for case in cases):
        raise SystemExit(f"error: {shlex.join(command)}\n{result.stdout}{result.stderr}")
    tried = [case.find("properties/property[@name='tried']") for case in cases]
    return sum(1 if one is None else int(one.attrib["value"]) for one in tried)


def main() -> None:
    """Run every row and write the table into docs/RELIABILITY.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="damage 10,000 inputs of each reader instead of 100")
    rows = ["| what was tried | times | what it costs | `python -m pytest -n 0` |", "| --- | ---: | --- | --- |"]
    fuzz, options = ROWS[-1][-1], ["-m", "long"] if parser.parse_args().long else []
    for what, cost, selection in ROWS:
        longer = options if selection == fuzz else []
        command = f"{shlex.join(longer)} {selection}".strip()
        rows.append(f"| {what} | {count(selection, *longer):,} | {cost} | `{command}` |")
        print(rows[-1], flush=True)
    found = environment.describe()
    rows += ["", f"On {found.device_name}, {found.threads} threads, torch {found.torch}, Python {found.python}."]
    pages.put(pages.RELIABILITY, "table", "\n".join(rows))


if __name__ == "__main__":
    main()
