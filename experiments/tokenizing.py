"""Compare writing a corpus of 1 GB as shards with tiktoken alone: `PYTHONPATH=src:. python experiments/tokenizing.py`.

Run it after the download stage, from the top of the repository; it works in a temporary folder.
"""

import argparse
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from experiments import pages
from gpt2_ladder import params_yaml
from gpt2_ladder.config import Data
from gpt2_ladder.measuring.gains import gain
from gpt2_ladder.sources import corpora
from gpt2_ladder.training import data, tokenizer
from pipeline import CORPUS, ENCODER_JSON, VOCAB_BPE, environment

MB = 10**6


def generate(folder: Path, megabytes: int) -> dict[str, Path]:
    """Write `megabytes` of tiny Shakespeare's lines, drawn at random, as text files and as parquet."""
    lines, draw = CORPUS.read_text().splitlines(keepends=True), random.Random(0)
    paths = {"text": folder / "text", "parquet": folder / "rows.parquet"}
    paths["text"].mkdir()
    with pq.ParquetWriter(paths["parquet"], pa.schema([("text", pa.string())])) as rows:
        for number in range(-(-megabytes // 64)):
            documents = []
            for _ in range(min(64, megabytes - 64 * number) * MB // 4000):
                documents.append("".join(draw.choices(lines, k=145)))  # 4,000 bytes
            (paths["text"] / f"{number:03}.txt").write_text("".join(documents))
            rows.write_table(pa.table({"text": documents}))
    return paths


def bare(megabytes: int) -> None:
    """Encode this much text with tiktoken, from memory, and discard the tokens."""
    encoding, text = tokenizer.open_encoding(VOCAB_BPE, ENCODER_JSON), CORPUS.read_text()[:MB]
    for _ in range(megabytes):
        encoding.encode_ordinary(text)


class Memory(threading.Thread):
    """Record the peak memory of this process and its new children in MiB; shared pages count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended, self.others = 0.0, threading.Event(), psutil.Process().children()

    def run(self) -> None:
        """Measure every second."""
        while not self.ended.wait(1):
            family = [psutil.Process(), *(child for child in psutil.Process().children() if child not in self.others)]
            with suppress(psutil.NoSuchProcess):  # a child has just ended
                self.peak = max(self.peak, sum(process.memory_full_info().pss for process in family) / 2**20)


def shards(source: str, path: Path, shard_tokens: int) -> tuple[float, float, int]:
    """Write the corpus at `path` as shards; return the seconds, the peak memory in MiB and the number of tokens."""
    changes = {"source": source, "path": str(path), "shard_tokens": shard_tokens}
    settings = Data.model_validate(params_yaml.load().data.model_dump() | changes)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        val, train, further = (Path(folder) / name for name in ("val.bin", "train.bin", "shards"))
        memory = Memory()
        memory.start()
        start = time.perf_counter()
        corpora.write(settings, VOCAB_BPE.absolute(), ENCODER_JSON.absolute(), val, train, further, PROCESSES)
        seconds = time.perf_counter() - start
        memory.ended.set()
        return seconds, memory.peak, len(data.open_shard(val)) + len(data.open_shards(train, further))


PROCESSES = torch.get_num_threads()


def main() -> None:
    """Measure both and write the table into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    part = args.megabytes // 4
    rows = ["| corpus | MB/s a process | of tiktoken alone | tokens/s | MiB at a quarter | MiB at the whole |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    with tempfile.TemporaryDirectory(dir=CORPUS.parent) as folder, ProcessPoolExecutor(PROCESSES) as pool:
        (Path(folder) / "part").mkdir()
        (Path(folder) / "whole").mkdir()
        parts = generate(Path(folder).absolute() / "part", part)
        wholes = generate(Path(folder).absolute() / "whole", args.megabytes)
        for source, path in parts.items():
            ours, theirs, peak = [], [], 0.0
            for _ in range(args.rounds):
                for arm in random.sample(["ours", "theirs"], 2):
                    if arm == "ours":
                        seconds, mib, _ = shards(source, path, 10 * MB)
                        ours.append(seconds)
                        peak = max(peak, mib)
                    else:
                        start = time.perf_counter()
                        list(pool.map(bare, [part // PROCESSES] * PROCESSES))
                        theirs.append(time.perf_counter() - start)
            seconds, mib, tokens = shards(source, wholes[source], 10 * MB)
            cells = [f"{args.megabytes / seconds / PROCESSES:.2f}", str(gain(theirs, ours))]
            rows.append(f"| {source} | {' | '.join(cells)} | {tokens / seconds:,.0f} | {peak:,.0f} | {mib:,.0f} |")
            print(rows[-1], flush=True)
    machine = environment.describe()
    rows += ["", f"{args.rounds} rounds of {part} MB, then {args.megabytes} MB once. "]
    rows[-1] += f"{machine.device_name}, {PROCESSES} processes, {os.cpu_count()} cores."
    print("\n".join(rows))
    pages.put(pages.PERFORMANCE, "tokenizing", "\n".join(rows))


if __name__ == "__main__":
    main()
