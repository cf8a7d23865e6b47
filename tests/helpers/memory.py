"""A limit on memory for tests."""

import torch

from gpt2_ladder.measuring import planning


class Capped(planning.LiveStorage):
    """Refuses storage past `cap` bytes more than are alive when it begins, in CUDA's words."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap, self.refused = cap, 0

    def _watch(self, storage: torch.UntypedStorage) -> bool:
        new = super()._watch(storage)
        if self.live > self.cap:
            self.refused += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.")
        return new
