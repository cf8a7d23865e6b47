"""What a step has to compute, and what the hardware could: FLOPs, known peaks, and the share that a level reaches."""

from gpt2_ladder.config import GPT2_VOCAB_SIZE, Size

Peaks = dict[str, float]

# Dense matrix products in TFLOP/s by nvidia-smi's name of the GPU and by precision, as NVIDIA's data sheets have them
# (without sparsity; GeForce with float32 accumulation). A GPU that is not here has no known peak: another's would be a
# guess. A precision that is missing is not there in hardware.
A100 = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0}
H100_SXM = {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5}
KNOWN_PEAKS: dict[str, Peaks] = {
    "Tesla T4": {"fp32": 8.1},
    "Tesla V100-SXM2-16GB": {"fp32": 15.7},
    "Tesla V100-SXM2-32GB": {"fp32": 15.7},
    "NVIDIA A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0},
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0},
    "NVIDIA L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0},
    "NVIDIA H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0},
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H200": H100_SXM,
    "NVIDIA GeForce RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0},
    "NVIDIA GeForce RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2},
}

# Bytes to and from the GPU's memory, in GB/s, from the same data sheets.
BANDWIDTH: dict[str, float] = {
    "Tesla T4": 320,
    "Tesla V100-SXM2-16GB": 900,
    "Tesla V100-SXM2-32GB": 900,
    "NVIDIA A10": 600,
    "NVIDIA A100-PCIE-40GB": 1555,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA L4": 300,
    "NVIDIA L40S": 864,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H200": 4800,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
}


def flops_per_token(size: Size, block_size: int) -> int:
    """Return the floating-point operations of forward and backward for one token: 6 N + 12 L T C.

    N is every parameter that is multiplied, so without the position embeddings. One formula for all levels: padded
    rows and a flash kernel's recomputation cost time but are no progress.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    C, L = size.n_embd, size.n_layer
    parameters = GPT2_VOCAB_SIZE * C + L * (12 * C * C + 13 * C) + 2 * C
    return 6 * parameters + 12 * L * block_size * C


def tflops(flops: float, milliseconds: float) -> float:
    """Return the rate of `flops` operations done in `milliseconds`, in TFLOP/s."""
    return flops / (milliseconds / 1000) / 1e12
