"""Check four GPTs with 24 planted faults each, their variants, and 112 right runs: `python -m experiments.checking`.

Set PYTHONPATH=src:. before it. The tables are written into docs/check.md, and every answer to
experiments/checking.json. experiments/gpts has the networks, and their faults as replaced lines.
"""

import time
from collections import Counter
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments import gpts, pages
from gpt2_ladder import files, params_yaml
from gpt2_ladder.checking.behaviour import FAIL, UNKNOWN
from gpt2_ladder.checking.verdict import Report, check
from gpt2_ladder.config import UserError
from gpt2_ladder.params import Params
from gpt2_ladder.reporting.tables import markdown_table
from gpt2_ladder.training import devices
from pipeline.environment import describe

ANSWERS = Path("experiments/checking.json")
CLASSES = {"video": "GPT", "mingpt": "GPT", "hub": "GPT", "paper": "GPT2"}
TITLES = {"video": "the video's", "mingpt": "minGPT's", "hub": "transformers'", "paper": "the paper's"}
NAMED = {  # words of the sentence that names a fault which changes the function
    "scores_unscaled": "is not scaled",
    "scores_by_width": "scaled by the width",
    "mask_missing": "no causal mask",
    "mask_sees_next": "sees the next one",
    "mask_hides_self": "does not see itself",
    "mask_after_softmax": "after the softmax",
    "softmax_over_queries": "over the queries",
    "heads_not_merged": "merged without",
    "heads_interleaved": "split as (D, H)",
    "relu": "ReLU",
    "norm_after": "after the residual addition",
    "norm_eps": "eps is 1e-12",
    "final_norm_missing": "final LayerNorm is not applied",
    "residual_missing": "MLP has no residual",
    "positions_missing": "does not add the position embeddings",
    "positions_shifted": "positions are off by one",
    "attention_bias_missing": "c_attn has no bias",
    "rows_mixed": "another row changes",
}
NETS = {  # sizes of the right runs
    "tiny": {},
    "deeper": {"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": 128},
}
SEEDS = 7


def ask(path: Path, name: str, params: Params, precision: str = "fp32", rounds: int = 0) -> dict[str, Any]:
    """Check the class of implementation `name` in the file at `path`; return what the page shows."""
    start = time.perf_counter()
    try:
        report: Report = check(f"{path}:{CLASSES[name]}", {}, params, describe(), precision, rounds=rounds)
        failed = [each.check for each in report.findings if each.verdict in (FAIL, UNKNOWN)]
        answer = {"sentence": report.sentence, "code": report.code, "failed": failed}
    except UserError as error:
        answer = {"sentence": str(error), "code": 1, "failed": ["error"]}
    return {**answer, "seconds": time.perf_counter() - start}


def main() -> None:
    """Check everything, write all answers, and then the tables."""
    torch.set_num_threads(describe().threads)
    devices.keep_freed_memory(torch.device("cpu"))
    tiny = params_yaml.load().model_copy(update={"model": "tiny"})
    answers: dict[str, Any] = {"faults": {}, "right": {}}
    with TemporaryDirectory() as folder:
        for name in CLASSES:
            for fault, source in gpts.planted(name).items():
                path = Path(folder, f"{name}.py")
                path.write_text(source)
                answers["faults"][f"{name}/{fault}"] = ask(path, name, tiny, rounds=5 if ":" in fault else 0)
                print(name, fault, answers["faults"][f"{name}/{fault}"], flush=True)
    for net, name, precision, seed in product(NETS, CLASSES, ("fp32", "bf16"), range(SEEDS)):
        size = tiny.size.model_copy(update=NETS[net])
        params = tiny.model_copy(update={"models": {**tiny.models, "tiny": size}, "seed": seed})
        case = f"{name}/{net}/{precision}/{seed}"
        answers["right"][case] = ask(gpts.FOLDER / f"{name}.py", name, params, precision, rounds=5)
        print(case, answers["right"][case], flush=True)
    answers["conditions"] = pages.conditions()
    files.write_json(ANSWERS, answers)
    write(answers)


def write(answers: dict[str, Any]) -> None:
    """Write the tables of all answers into the page."""
    faults, right = answers["faults"], answers["right"]
    rows, totals = [["planted fault", *TITLES.values()]], Counter[str]()
    names = [fault for fault in gpts.planted("video") if ":" not in fault]
    for fault in names:
        cells = []
        for name in CLASSES:
            answer = faults[f"{name}/{fault}"]
            found = answer["code"] == 1
            named = found and NAMED.get(fault, "\0") in answer["sentence"]
            totals.update({f"{name} found": found, f"{name} named": named})
            cells.append(", ".join(["found"] * found + ["named"] * named) or "**missed**")
        rows.append([f"`{fault}`", *cells])
    rows.append(["found", *(f"{totals[f'{name} found']} of {len(names)}" for name in CLASSES)])
    rows.append(["named", *(f"{totals[f'{name} named']} of {len(NAMED)}" for name in CLASSES)])
    seconds = [answer["seconds"] for answer in (*faults.values(), *right.values())]
    alarms = [case for case, answer in right.items() if answer["code"]]
    summary = (
        f"False alarms in {len(right)} right runs: {len(alarms)}. {len(seconds)} checks took {sum(seconds) / 60:.0f} "
        f"minutes, the longest {max(seconds):.0f} s.\n{answers['conditions']}"
    )
    pages.put(pages.CHECK, "faults", f"{markdown_table(rows, 5)}\n\n{summary}")
    variants = [["variant", "implementation", "answer"]]
    for case, answer in faults.items():
        name, _, fault = case.partition("/")
        if fault.startswith("variant: "):
            variants.append(
                [
                    fault.removeprefix("variant: "),
                    TITLES[name],
                    answer["sentence"].partition(", and its step")[0].replace("|", "/"),
                ]
            )
    pages.put(pages.CHECK, "variants", markdown_table(variants, 3))


if __name__ == "__main__":
    main()
