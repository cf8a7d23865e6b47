"""Predict the peak memory and the shortest step time of every speed level, without running it."""

import re

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring import cost, planning
from gpt2_ladder.reporting.tables import markdown_table
from gpt2_ladder.training import devices, precisions
from pipeline import Parser, read_settings, run

SHOWN: tuple[str, ...] = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090")
NOTE = """\
Peak: the memory of torch's tensors; compiled levels need at most as much. Largest B: the largest batch size that leaves
1 GiB and a tenth of the remaining memory free. Least ms: a lower bound (roofline) from the GPU's peak arithmetic rate
and its memory bandwidth; not measured. docs/memory.md shows the errors of both predictions."""


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.tools.plan", description=__doc__)
    parser.add_argument("--memory", metavar="SIZE", help="plan for a GPU with this much free memory, such as 24GiB")
    memory = parser.parse_args(arguments).memory
    if memory is not None:
        params = params_yaml.load()
        cuda, free, where, gpus = True, parse_memory(memory), f"an NVIDIA GPU with {memory} free", SHOWN
    else:
        params, environment = read_settings()
        device = devices.open_device(environment.device, environment.threads, params.seed, params.deterministic)
        cuda, free = devices.allocates_like_cuda(device), devices.free_memory(device)
        where = f"{environment.device_name}, {free / 2**30:.1f} GiB free"
        gpus = (environment.device_name,) if environment.device_name in cost.KNOWN_PEAKS else SHOWN
    if cuda and params.machine != "gpu":
        print("params.yaml: machine is cpu, so this plan uses the CPU's B and T; set machine: gpu for the GPU's")
    shape = params.shape("speed")
    B, T = shape.batch_size, shape.block_size
    tflop = B * T * cost.flops_per_token(params.size, T) / 1e12
    rows = [["level", "peak GiB", "largest B", *(f"least ms {gpu.removeprefix('NVIDIA ')}" for gpu in gpus)]]
    for name, level in params.levels.items():
        if level.group == "speed":
            network, operand = params.gpt(level), precisions.PRECISIONS[level.precision].operand
            step = planning.trace_step(network, operand, B, T, cuda)
            largest = planning.largest_batch(network, operand, T, cuda, free)
            times = [planning.least_ms(step, gpu, level.precision, level.compile) for gpu in gpus]
            cells = ["-" if ms is None else f"{ms:,.3g}" for ms in times]
            rows.append([name, f"{step.peak_bytes / 2**30:.2f}", str(largest or "none"), *cells])
    print(f"GPT-2 ({params.model}) at {B} x {T} on {where}; {tflop:.2f} TFLOP per step\n")
    print(markdown_table(rows, text_columns=1), NOTE, sep="\n\n")


def parse_memory(text: str) -> int:
    """Convert a size such as 24GiB, 80GB or 512 MiB to bytes; raise UserError if `text` is not a size."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*([GM])(i?)B", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"--memory {text}: write a number and a unit, such as 24GiB or 80GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** {"m": 2, "g": 3}[prefix.lower()])


if __name__ == "__main__":
    run(main)
