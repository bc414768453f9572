"""Processes of a run that no longer answer are named: each sends every other a datagram a second, and listens.

A process that ends is its launcher's to see. One that is stopped, or whose machine is gone, is seen by nobody, and the
others would wait in the next sum for half an hour. Who was heard before and then is not for `SILENT_S` is named, and
killed if it is on this machine, because a stopped process does not end when its launcher asks; then this process ends
with status 2, and the launcher ends the others.

It does not measure speed: a thread of its own sends, however long a step takes. It takes no part in what the processes
send one another for their work, so no bit depends on it. A machine that is held up itself (suspended, short of
processors) names nobody: after a gap in its own sending it counts anew. Where a network lets no datagrams through,
nobody is heard and nobody named.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from model.program.startup import end_now

SILENT_S = 30.0
BEAT_S = 1.0
HELD_UP_S = 5.0  # a gap in a process's own sending that says that this machine is held up
BEAT, LEFT = b"beat", b"left"


@dataclass(frozen=True)
class Place:
    """Where a process runs and listens."""

    host: str
    pid: int
    address: tuple[Any, ...]  # of its datagram socket

    def kill(self) -> None:
        """If it is on this machine."""
        if self.host == socket.gethostname():
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Heartbeat:
    """Sends for one of a run's processes and listens to the others until `stop`."""

    def __init__(
        self, rank: int, meeting: tuple[str, int], gather: Callable[[Place], list[Any]], silent_s: float = SILENT_S
    ) -> None:
        """``meeting``: address and port where the processes have met; ``gather`` gives everyone's value, in rank order,
        to everyone."""
        self._silent_s = silent_s
        self._stopped = threading.Event()
        family, _, _, _, target = socket.getaddrinfo(*meeting, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing, but says which address of ours leads there
            own = probe.getsockname()[0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind((own, 0))
        places = gather(Place(socket.gethostname(), os.getpid(), self._socket.getsockname()))
        self._others: dict[int, Place] = {r: place for r, place in enumerate(places) if r != rank}
        self._thread = threading.Thread(target=self._beat, args=(rank,), name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tells the others to expect nothing more of this process, and closes the socket. Call it when the processes
        part."""
        self._stopped.set()
        self._thread.join(2 * BEAT_S)

    def _beat(self, rank: int) -> None:
        heard: dict[int, float] = {}  # rank -> when, for those that were heard at all
        before = time.monotonic()
        while not self._stopped.is_set():
            self._send(rank, BEAT)
            self._listen(heard)
            now = time.monotonic()
            if now - before > HELD_UP_S:
                heard = dict.fromkeys(heard, now)
            before = now
            for other, since in heard.items():
                if now - since > self._silent_s:
                    self._end(other)
        self._send(rank, LEFT)
        self._socket.close()

    def _send(self, rank: int, what: bytes) -> None:
        for place in self._others.values():
            with suppress(OSError):
                self._socket.sendto(b"%s %d" % (what, rank), place.address)

    def _listen(self, heard: dict[int, float]) -> None:
        """For `BEAT_S`."""
        end = time.monotonic() + BEAT_S
        while (left := end - time.monotonic()) > 0 and not self._stopped.is_set():
            self._socket.settimeout(left)
            with suppress(OSError, ValueError):
                what, number = self._socket.recvfrom(64)[0].split()
                rank = int(number)
                if what == LEFT:
                    heard.pop(rank, None)
                elif rank in self._others:
                    heard[rank] = time.monotonic()

    def _end(self, rank: int) -> None:
        place = self._others[rank]
        end_now(
            f"process {rank} of this run (pid {place.pid} on {place.host}) has not answered for {self._silent_s:g} s: "
            "it was stopped, it hangs, or its machine is gone. The run ends here; --resume goes on with it",
            last=place.kill,
        )
