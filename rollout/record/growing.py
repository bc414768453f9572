"""Bytes that are appended to for as long as a session lives.

They lie in one piece of memory, which is replaced by one of twice the size when it is full. A small tensor for each
chunk instead, which stays among large ones that come and go, would break up glibc's heap: a process grew by 100 kB a
chunk, 1.8 GB an hour.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_BYTES = 2**14


class Growing:
    """uint8 [B]; empty at first."""

    def __init__(self) -> None:
        self._memory, self._size = torch.empty(FIRST_BYTES, dtype=torch.uint8), 0

    def append(self, part: Tensor) -> None:
        """Copies ``part``, uint8 of any shape, behind the rest."""
        size = self._size + part.numel()
        if size > len(self._memory):
            memory = torch.empty(max(2 * len(self._memory), size), dtype=torch.uint8)
            memory[: self._size] = self.all()
            self._memory = memory
        self._memory[self._size : size] = part.reshape(-1)
        self._size = size

    def all(self) -> Tensor:
        """What was appended: a view, until the next `append`."""
        return self._memory[: self._size]

    def copy(self) -> Growing:
        """One of its own memory, with the same content."""
        twin = Growing()
        twin.append(self.all())
        return twin

    @property
    def nbytes(self) -> int:
        """Of the memory that has been written."""
        return self._size
