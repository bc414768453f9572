"""Processes of a run that no longer answer are named: each beats in a store of rank 0, and looks at the others' beats.

A process that ends is its launcher's to see. One that is stopped, or whose machine is gone, is seen by nobody, and the
others would wait in the next sum for half an hour. So a thread of each counts up in the store. Whose count stands still
for `SILENT_S` is named, and killed if it is on this machine, because a stopped process does not end when its launcher
asks; then this process ends with status 2, and the launcher ends the others.

It does not measure speed: the thread beats however long a step takes. It takes no part in what the processes send one
another, so no bit depends on it. A machine that is held up itself (suspended, short of processors) accuses nobody: a
gap between its own beats starts its counting anew.
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
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import TCPStore

from model.program.startup import end_now

SILENT_S = 30.0
BEAT_S = 1.0
HELD_UP_S = 5.0  # a gap between own beats that says that this machine is held up
CONNECT_S = 60.0
LEFT = b"left"


@dataclass(frozen=True)
class Place:
    """Where a process runs; rank 0's says at which port its store is."""

    host: str
    pid: int
    port: int

    def kill(self) -> None:
        """If it is on this machine."""
        if self.host == socket.gethostname():
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Heartbeat:
    """Beats for a process and watches the others until `stop`."""

    def __init__(
        self,
        rank: int,
        world: int,
        address: str,
        gather: Callable[[Place], list[Any]],
        silent_s: float = SILENT_S,
    ) -> None:
        """``address``: of rank 0's machine; ``gather`` gives everyone's value, in rank order."""
        self._rank, self._silent_s = rank, silent_s
        self._stopped = threading.Event()
        self._round = 0
        connect = partial(TCPStore, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S))
        store = connect(address, 0, is_master=True) if rank == 0 else None
        if store is not None:
            for r in range(world):
                store.set(str(r), "0")
        self._places: list[Place] = gather(Place(socket.gethostname(), os.getpid(), store.port if store else 0))
        self._store = store or connect(address, self._places[0].port, is_master=False)
        self._store.set_timeout(timedelta(days=365))  # a call that waits is `_watch_store`'s to judge
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch_store)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """From now on nobody minds this process's silence. Call it when the processes part."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * BEAT_S)

    def _beat(self) -> None:
        """Counts up, and finds whose count has not moved."""
        others = [r for r in range(len(self._places)) if r != self._rank]
        seen = dict.fromkeys(others, b"")
        moved = dict.fromkeys(others, time.monotonic())
        before = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            self._round += 1
            try:
                self._store.set(str(self._rank), str(self._round))
                counts = self._store.multi_get([str(r) for r in others])
            except RuntimeError:  # rank 0 has ended; its launcher knows
                return
            now = time.monotonic()
            for r, count in zip(others, counts, strict=True):
                if count != seen[r] or count == LEFT or now - before > HELD_UP_S:
                    seen[r], moved[r] = count, now
                elif now - moved[r] > self._silent_s:
                    self._end(r)
            before = now
        with suppress(RuntimeError):
            self._store.set(str(self._rank), LEFT.decode())

    def _watch_store(self) -> None:
        """Finds that `_beat` waits in a call on the store, which no longer answers when rank 0 does not."""
        seen, since = -1, time.monotonic()
        before = since
        while self._threads[0].is_alive() and not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            if self._round != seen or now - before > HELD_UP_S:
                seen, since = self._round, now
            elif now - since > self._silent_s:
                self._end(0)
            before = now

    def _end(self, rank: int) -> None:
        place = self._places[rank]
        end_now(
            f"process {rank} of this run (pid {place.pid} on {place.host}) has not answered for {self._silent_s:g} s: "
            "it was stopped, it hangs, or its machine is gone. The run ends here; --resume goes on with it",
            last=place.kill,
        )
