"""Count a training step's floating-point operations (FLOPs), and list the peak rates of known GPUs."""

from gpt2_ladder.config import GPT2_VOCAB_SIZE, Size

A100 = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0}
H100_SXM = {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5}
# {GPU name, as nvidia-smi prints it: (memory bandwidth in GB/s, {precision: TFLOP/s of dense matrix products})}, from
# NVIDIA's data sheets: without sparsity, for GeForce with float32 accumulation, without unsupported precisions.
GPUS: dict[str, tuple[float, dict[str, float]]] = {
    "Tesla T4": (320, {"fp32": 8.1}),
    "Tesla V100-SXM2-16GB": (900, {"fp32": 15.7}),
    "Tesla V100-SXM2-32GB": (900, {"fp32": 15.7}),
    "NVIDIA A10": (600, {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0}),
    "NVIDIA A100-PCIE-40GB": (1555, A100),
    "NVIDIA A100 80GB PCIe": (1935, A100),
    "NVIDIA A100-SXM4-40GB": (1555, A100),
    "NVIDIA A100-SXM4-80GB": (2039, A100),
    "NVIDIA L4": (300, {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0}),
    "NVIDIA L40S": (864, {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0}),
    "NVIDIA H100 PCIe": (2000, {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0}),
    "NVIDIA H100 80GB HBM3": (3350, H100_SXM),
    "NVIDIA H200": (4800, H100_SXM),
    "NVIDIA GeForce RTX 3090": (936, {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0}),
    "NVIDIA GeForce RTX 4090": (1008, {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2}),
}
BANDWIDTH = {name: bandwidth for name, (bandwidth, _) in GPUS.items()}
KNOWN_PEAKS = {name: peaks for name, (_, peaks) in GPUS.items()}


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
