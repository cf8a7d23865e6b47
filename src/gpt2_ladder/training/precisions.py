"""What fp32, tf32, bf16 and fp16 mean. Only runtime.py applies it: this module does not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """One row of PRECISIONS. Parameters, gradients and the optimizer's state are always float32."""

    float32_matmul: str  # how float32 matrices are multiplied: "ieee", or "tf32" with 10-bit mantissas
    operand: str  # "fp32", "bf16" or "fp16": the type of matrix products' operands; for the last two by autocast
    scaled: bool = False  # the loss is scaled up, because float16 rounds numbers below 3e-8 to zero


PRECISIONS = {
    "fp32": Precision("ieee", "fp32"),
    "tf32": Precision("tf32", "fp32"),
    "bf16": Precision("ieee", "bf16"),
    "fp16": Precision("ieee", "fp16", scaled=True),
}
