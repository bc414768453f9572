"""What a stretch of the program may ask of a device at the most, and what the `ledger` says it asked beyond that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.pretend.device import ledger


@dataclass(frozen=True)
class Bounds:
    kernels: int  # ours
    launches: Mapping[str, int]  # torch's, by name; those not named: none
    waits: int
    copies: int
    reads: int


def excess(bounds: Bounds) -> list[str]:
    """What the ledger counted beyond the bounds since it was cleared, with the program's lines that did it: ``3 waits,
    at most 1: 2 x wait, _local_scalar_dense (model/backbone/moe.py:112 in forward) …``. `ledger.trace` must be set."""
    out = [
        _line(f"{found} {name}, at most {most}", prefix)
        for name, found, most, prefix in (
            ("kernels", sum(ledger.kernels.values()), bounds.kernels, "kernel "),
            ("waits", sum(ledger.waits.values()), bounds.waits, "wait, "),
            ("copies to the device", ledger.copies, bounds.copies, ("copy to the device", "wait, copy to the device")),
            ("reads", ledger.reads, bounds.reads, "wait, copy to the host"),
        )
        if found > most
    ]
    return out + [
        _line(f"{found} launches of torch's {name}, at most {bounds.launches.get(name, 0)}", f"launch {name}")
        for name, found in ledger.launches.items()
        if found > bounds.launches.get(name, 0)
    ]


def _line(said: str, prefix: str | tuple[str, ...]) -> str:
    places = [
        f"{count} x {what} ({where})" for (what, where), count in ledger.places.items() if what.startswith(prefix)
    ]
    return f"{said}: {', '.join(places)}"
