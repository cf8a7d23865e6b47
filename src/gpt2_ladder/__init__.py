"""GPT-2 124M, and the ladder of optimizations that makes its training fast."""
