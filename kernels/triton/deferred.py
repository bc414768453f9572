"""Errors that only a kernel can notice: told at once, or, inside a `deferred` block, with the block's one read-out.

A kernel that meets a bad value (an expert or a code that is none, a row of logits without a token) uses another in its
place, so that it reads and writes only what is its own, and stores 1 into a word on the device. All that store store
the same, so no order matters. Whoever reads the word finds out by the op's own ``explain`` which value it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.upload import receive

Explain = Callable[[], None]
"""Raises the error of the op that noticed one; waits for the device. Does nothing when it noticed none."""


class _Block:
    def __init__(self) -> None:
        self.word: Tensor | None = None  # int32 [1] on the device, 0 until a kernel notices something
        self.checks: list[Explain] = []  # of the calls since it was last read, in order


_active = threading.local()


def _block() -> _Block | None:
    return getattr(_active, "block", None)


@contextmanager
def deferred() -> Iterator[None]:
    """See `kernels.ops.deferred`."""
    if _block() is not None:
        raise RuntimeError("ops.deferred: one block inside another; errors would be told by the wrong one")
    block = _active.block = _Block()
    try:
        yield
        if block.checks:
            _raise_for(block, bool(block.word))
    finally:
        _active.block = None


def fetch(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """See `kernels.ops.fetch`."""
    block = _block()
    if block is None or block.word is None:
        return tuple(receive(parts))
    *found, word = receive([*parts, block.word])
    _raise_for(block, bool(word))
    return tuple(found)


def word_on(device: torch.device) -> Tensor:
    """The word for a kernel to store into: the block's, or one of the call's own."""
    block = _block()
    if block is None:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if block.word is None:
        block.word = torch.zeros(1, dtype=torch.int32, device=device)
    return block.word


def settle(word: Tensor, explain: Explain) -> None:
    """After the launch: raises what ``explain`` does if the kernel noticed something, for which it waits; in a block
    leaves that to the block."""
    block = _block()
    if block is not None:
        block.checks.append(explain)
    elif bool(word):
        _explain([explain])


def fresh() -> list[Tensor]:
    """A word to be sent to the device with other tensors and then given to `use`; none when none is needed."""
    block = _block()
    return [torch.zeros(1, dtype=torch.int32)] if block is not None and block.word is None else []


def use(words: Sequence[Tensor]) -> None:
    block = _block()
    if block is not None and words:
        (block.word,) = words


def _raise_for(block: _Block, noticed: bool) -> None:
    checks, block.checks = block.checks, []
    if noticed:
        _explain(checks)


def _explain(checks: Sequence[Explain]) -> None:
    for explain in checks:
        explain()
    raise RuntimeError("a kernel noticed a value out of its range, but no op finds one: a defect of the program")
