"""Records every call of the native library that `cases.digests` makes: arguments, and the memory before and after.

    python -m tests.kernels.native.record FILE

replay.c runs the record on another build or machine, without Python and torch. A record is made of 64-bit words: the
size in bytes of the calls, then each call (name in 64 bytes; returned value; number of buffers, and for each its size
and the places of its bytes before and after; number of arguments, and for each kind, value, offset), then the buffers'
bytes, equal ones once.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.cpu import library
from model.program.files import write_whole

INTEGER, FLOAT, ADDRESS = range(3)
DATA_PTR = torch.Tensor.data_ptr


class Recorder:
    """Stands in for `library.bind` and keeps the calls made through what it returns; and for `Tensor.data_ptr`, to know
    what memory an address belongs to."""

    def __init__(self) -> None:
        self._memory: dict[int, tuple[int, int]] = {}  # a tensor's address: its storage's address and size
        self._calls: list[Callable[[list[int]], list[int]]] = []
        self._places: dict[bytes, int] = {}  # index of distinct memory
        self.names: list[str] = []

    def bind(self, name: str, arguments: str) -> Callable[..., int]:
        function = library._bind(library.library(), name, arguments)

        def call(*values: int | float | None) -> int:
            buffers: list[tuple[int, int]] = []  # address, size
            words: list[int] = [len(values)]
            for letter, value in zip(arguments, values, strict=True):
                if letter == "f":
                    words += [FLOAT, *struct.unpack("<I", struct.pack("<f", value)), 0]
                elif letter == "p" and value:
                    block = self._memory[int(value)]
                    if block not in buffers:
                        buffers.append(block)
                    words += [ADDRESS, buffers.index(block), int(value) - block[0]]
                else:
                    words += [INTEGER, int(value or 0) & (2**64 - 1), 0]  # None is the null pointer
            before = [self._place(block) for block in buffers]
            result = function(*values)
            after = [self._place(block) for block in buffers]
            head = [*struct.unpack("<8Q", name.encode().ljust(64, b"\0")), result & (2**64 - 1), len(buffers)]

            def finish(places: list[int]) -> list[int]:
                rows = zip(buffers, before, after, strict=True)
                return [*head, *(word for (_, size), b, a in rows for word in (size, places[b], places[a])), *words]

            self._calls.append(finish)
            self.names.append(name)
            return result

        return call

    def data_ptr(self, x: torch.Tensor) -> int:
        address, storage = DATA_PTR(x), x.untyped_storage()
        self._memory[address] = (storage.data_ptr(), storage.nbytes())
        return address

    def _place(self, block: tuple[int, int]) -> int:
        return self._places.setdefault(ctypes.string_at(*block), len(self._places))

    def packed(self) -> bytes:
        blobs = list(self._places)
        none = [0] * len(blobs)
        start = 8 * (1 + sum(len(call(none)) for call in self._calls))
        places, at = [], start
        for blob in blobs:
            places.append(at)
            at += len(blob)
        words = [start, *(word for call in self._calls for word in call(places))]
        return struct.pack(f"<{len(words)}Q", *words) + b"".join(blobs)


def _exported() -> set[str]:
    """The library's functions, without those that measure the machine for kernels.tools.bench."""
    native = Path(library.__file__).with_name(f"_native_{library.isa()}.so")
    said = subprocess.run(
        ["nm", "-D", "--defined-only", str(native)], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[2] for line in said.splitlines() if line.split()[1] == "T"}
    return {name for name in names if not name.startswith("ceiling_")}


def record() -> Recorder:
    """Runs `cases.digests` in this process, whose ops must not have been imported yet; RuntimeError if that leaves a
    function of the library uncalled."""
    bound = [name for name in ("kernels.cpu.linear", "kernels.cpu.backend") if name in sys.modules]
    if bound:
        raise RuntimeError(f"record in a process of its own: {bound} have bound their functions already")
    recorder = Recorder()
    library.bind = recorder.bind
    torch.Tensor.data_ptr = lambda x: recorder.data_ptr(x)  # a lambda, since a bound method would not bind to x
    from tests.kernels.native.cases import digests

    digests()
    if missing := _exported() - set(recorder.names):
        raise RuntimeError(f"tests/kernels/native/cases.py never calls {sorted(missing)}")
    return recorder


if __name__ == "__main__":
    recorded = record()
    write_whole(Path(sys.argv[1]), recorded.packed())
    print(f"{len(recorded.names)} calls of {len(set(recorded.names))} functions")
