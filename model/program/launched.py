"""What a launcher says in the environment of the processes that it starts: torch's convention, read in one place."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from kernels.errors import MetronomeError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CURE = "Start by `metronome train` or `accelerate launch`, or `unset {names}` for a run of one process"


@dataclass(frozen=True)
class Launched:
    """This process among those of its run."""

    rank: int
    local_rank: int  # among those on this machine
    world: int
    local_world: int  # how many run on this machine; all, if the launcher does not say
    address: str  # of the machine where the processes meet
    port: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Launched | None:
        """What the launcher said; None when there is none. Raises MetronomeError when it is not all there, as when a
        variable is left over from something else, or is not what it should be."""
        if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
            return None  # MASTER_ADDR and its like alone are set by many systems, for nobody in particular
        given = [name for name in VARIABLES if name in environment]
        missing = [name for name in VARIABLES if name not in environment]
        cure = CURE.format(names=" ".join(given))
        if missing:
            present = " ".join(f"{name}={environment[name][:40]!r}" for name in given)
            raise MetronomeError(f"the environment has {present}, but not {', '.join(missing)}. {cure}")
        world = _whole(environment, "WORLD_SIZE", 1, 1 << 20, cure)
        stated = "LOCAL_WORLD_SIZE" in environment
        local_world = _whole(environment, "LOCAL_WORLD_SIZE", 1, world, cure) if stated else world
        return cls(
            rank=_whole(environment, "RANK", 0, world - 1, cure),
            local_rank=_whole(environment, "LOCAL_RANK", 0, local_world - 1, cure),
            world=world,
            local_world=local_world,
            address=environment["MASTER_ADDR"],
            port=_whole(environment, "MASTER_PORT", 1, 65535, cure),
        )

    def check_address(self) -> None:
        """Raises MetronomeError when no machine has that name."""
        try:
            socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise MetronomeError(
                f"MASTER_ADDR={self.address[:80]!r}: no machine of that name is known here ({error}). Give the "
                "launcher the name or number of the machine of rank 0 (--main_process_ip)"
            ) from error


def local_world() -> int:
    """How many of the run's processes are on this machine; 1 without a launcher. Raises as `Launched.read` does."""
    launched = Launched.read()
    return 1 if launched is None else launched.local_world


def _whole(environment: Mapping[str, str], name: str, least: int, most: int, cure: str) -> int:
    text = environment[name].strip()
    if text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most:
        return int(text)
    raise MetronomeError(
        f"{name}={environment[name][:40]!r} in the environment: a number from {least} to {most}. {cure}"
    )
