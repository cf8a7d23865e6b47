"""A limit on memory for tests."""

import torch

from gpt2_ladder.measuring import planning


class Capped(planning.LiveStorage):
    """Refuse storage beyond `cap` bytes with CUDA's error message; storage from before does not count."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap, self.refused = cap, 0

    def _watch(self, storage: torch.UntypedStorage) -> bool:
        new = super()._watch(storage)
        if self.live > self.cap:
            self.refused += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.")
        return new
