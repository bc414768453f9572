"""Bytes that are appended to for as long as a session lives.

They lie in a few large pieces of memory that stay where they are. A small tensor for each chunk, which stays among
large ones that come and go, would break up glibc's heap (a process grew by 100 kB a chunk, 1.8 GB an hour), and one
piece that is replaced by a larger one leaves holes in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_BYTES, MOST_BYTES = 2**14, 2**20
"""Of a piece: each is as large as all before it, within these."""


class Growing:
    """uint8 [B]; empty at first."""

    def __init__(self) -> None:
        self._full: list[Tensor] = []
        self._piece, self._used = torch.empty(FIRST_BYTES, dtype=torch.uint8), 0
        self.nbytes = 0

    def append(self, part: Tensor) -> None:
        """Copies ``part``, uint8 of any shape, behind the rest."""
        left = part.reshape(-1)
        self.nbytes += len(left)
        while len(left) > len(self._piece) - self._used:
            room = len(self._piece) - self._used
            self._piece[self._used :] = left[:room]
            self._full.append(self._piece)
            left = left[room:]
            size = min(max(FIRST_BYTES, self.nbytes - len(left)), MOST_BYTES)
            self._piece, self._used = torch.empty(size, dtype=torch.uint8), 0
        self._piece[self._used : self._used + len(left)] = left
        self._used += len(left)

    def tail(self, count: int) -> Tensor:
        """A copy of the last ``count`` bytes, of which there must be so many."""
        parts, missing = [self._piece[max(0, self._used - count) : self._used]], count - self._used
        for piece in reversed(self._full):
            if missing <= 0:
                break
            parts.append(piece[max(0, len(piece) - missing) :])
            missing -= len(piece)
        return torch.cat(parts[::-1])

    def all(self) -> Tensor:
        """A copy of what was appended."""
        return self.tail(self.nbytes)

    def copy(self) -> Growing:
        """One of its own memory, with the same content."""
        twin = Growing()
        twin.append(self.all())
        return twin
