"""Reads safetensors files without trusting them. Every file of tensors that another program may have
written is read here; what a run hands its own workers is not.

The library checks that header and bytes agree; here all that it may raise, and what is no file, becomes
`UnreadableError`, one line each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.program.reading import UnreadableError, size_of
from model.weights.pickles import disguised

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types in which weights may be stored, as safetensors names them."""
MOST_MAPPED_BYTES = 1 << 26
"""`Files` keeps no more of a file mapped, and one tensor."""


def stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of everything in a file, one tensor in memory at a time. Raises UnreadableError for a file
    that is missing, damaged or no file."""
    size_of(path)  # opening a pipe would never end
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:  # the last three: absurd shapes
        raise _damaged(path, error) from None


def shapes(path: Path) -> Iterator[tuple[str, Tensor]]:
    """`stored` for weights, on the meta device: names, shapes and types. Raises UnreadableError for a tensor of a type
    that is not in `FLOATS`, too."""
    size_of(path)
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in FLOATS:
                    problem = f"{name} is of type {part.get_dtype()}, but weights are one of {', '.join(FLOATS)}"
                    raise UnreadableError(path, problem)
                yield name, torch.empty(part.get_shape(), dtype=FLOATS[part.get_dtype()], device="meta")
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from None


class Files:
    """Reads single tensors of files, each a view of its file's mapped pages. These leave this process' memory when the
    tensor is gone and so much more was read of the file, or another file was begun."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._left = 0  # bytes to read before the file is mapped anew

    def tensor(self, path: Path, name: str) -> Tensor:
        """Raises UnreadableError as `stored` does."""
        try:
            if path != self._path or self._left <= 0:
                size_of(path)
                self._file, self._path, self._left = safe_open(path, "pt"), path, MOST_MAPPED_BYTES
            found: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(path, error) from None
        self._left -= found.nbytes
        return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name. Raises UnreadableError as `stored` does."""
    return dict(stored(path))


def _damaged(path: Path, error: Exception) -> UnreadableError:
    if problem := disguised(path):
        return UnreadableError(path, problem)
    return UnreadableError(path, f"is damaged ({' '.join(str(error).split())[:200]})")
