"""Count a training step's floating-point operations (FLOPs), and list the peak rates of known GPUs."""

from dataclasses import dataclass

from gpt2_ladder.config import GPT2_VOCAB_SIZE, Size

A100 = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0}
HOPPER_SXM = {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5}
HOPPER_NVL = {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5}
# {GPU name, as nvidia-smi prints it: (memory bandwidth in GB/s, {precision: TFLOP/s of dense matrix products})}, from
# NVIDIA's data sheets and white papers: without sparsity, for GeForce with float32 accumulation, without unsupported
# precisions; fp16's is bf16's. B200 is left out, because NVIDIA's pages differ: 75 or 80 in fp32, 1125 or 1100 in tf32.
GPUS: dict[str, tuple[float, dict[str, float]]] = {
    "Tesla T4": (320, {"fp32": 8.1, "fp16": 65.0}),  # T4 data sheet
    "Tesla V100-PCIE-16GB": (900, {"fp32": 14.0, "fp16": 112.0}),  # V100 data sheet
    "Tesla V100-PCIE-32GB": (900, {"fp32": 14.0, "fp16": 112.0}),  # V100 data sheet
    "Tesla V100-SXM2-16GB": (900, {"fp32": 15.7, "fp16": 125.0}),  # V100 data sheet
    "Tesla V100-SXM2-32GB": (900, {"fp32": 15.7, "fp16": 125.0}),  # V100 data sheet
    "NVIDIA A10": (600, {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0}),  # A10 data sheet
    "NVIDIA A10G": (600, {"fp32": 35.0, "tf32": 35.0, "bf16": 70.0}),  # A10G for AWS data sheet, 2022
    "NVIDIA A30": (933, {"fp32": 10.3, "tf32": 82.0, "bf16": 165.0}),  # A30 data sheet
    "NVIDIA A100-PCIE-40GB": (1555, A100),  # A100 data sheet
    "NVIDIA A100 80GB PCIe": (1935, A100),  # A100 data sheet
    "NVIDIA A100-SXM4-40GB": (1555, A100),  # A100 data sheet
    "NVIDIA A100-SXM4-80GB": (2039, A100),  # A100 data sheet
    "NVIDIA RTX A6000": (768, {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8}),  # GA102 white paper v2, table 3
    "NVIDIA L4": (300, {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0}),  # L4 data sheet
    "NVIDIA L40": (864, {"fp32": 90.5, "tf32": 90.5, "bf16": 181.05}),  # L40 data sheet
    "NVIDIA L40S": (864, {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0}),  # L40S data sheet
    "NVIDIA RTX 6000 Ada Generation": (960, {"fp32": 91.1, "tf32": 182.1, "bf16": 364.2}),  # RTX PRO white paper
    "NVIDIA H100 PCIe": (2000, {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0}),  # H100 data sheet
    "NVIDIA H100 NVL": (3900, HOPPER_NVL),  # H100 NVL data sheet
    "NVIDIA H100 80GB HBM3": (3350, HOPPER_SXM),  # H100 data sheet
    "NVIDIA GH200 480GB": (4000, HOPPER_SXM),  # GH200 data sheet, 96 GB of HBM3
    "NVIDIA GH200 144G HBM3e": (4900, HOPPER_SXM),  # GH200 data sheet
    "NVIDIA H200": (4800, HOPPER_SXM),  # H200 data sheet
    "NVIDIA H200 NVL": (4800, HOPPER_NVL),  # H200 data sheet
    "NVIDIA GeForce RTX 3090": (936, {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0}),  # GA102 white paper v2, appendix A
    "NVIDIA GeForce RTX 4080": (716.8, {"fp32": 48.7, "tf32": 48.7, "bf16": 97.5}),  # Ada white paper v2.1
    "NVIDIA GeForce RTX 4090": (1008, {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2}),  # Ada white paper v2.1, appendix A
    "NVIDIA GeForce RTX 5090": (1792, {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5}),  # RTX Blackwell white paper
}
BANDWIDTH = {name: bandwidth for name, (bandwidth, _) in GPUS.items()}
KNOWN_PEAKS = {name: {**peaks, "fp16": peaks.get("fp16") or peaks["bf16"]} for name, (_, peaks) in GPUS.items()}


@dataclass(frozen=True)
class Operator:
    """The cost of one operator in one profiled step."""

    name: str  # torch's name of the operator
    calls: int
    self_ms: float  # without the operators that it calls; on a GPU, the time of the kernels that it launches


def flops_per_token(size: Size, block_size: int) -> int:
    """Return the FLOPs that one token needs in forward and backward: 6 N + 12 L T C.

    N is the number of parameters without the position embeddings, which are added, not multiplied. The formula is the
    same for all levels: the extra work of a padded vocabulary or of recomputation in a flash kernel is not counted.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    C, L = size.n_embd, size.n_layer
    parameters = GPT2_VOCAB_SIZE * C + L * (12 * C * C + 13 * C) + 2 * C
    return 6 * parameters + 12 * L * block_size * C


def tflops(flops: float, milliseconds: float) -> float:
    """Return the TFLOP/s of `flops` operations that took `milliseconds`."""
    return flops / (milliseconds / 1000) / 1e12
