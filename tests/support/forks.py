"""Several ranks forked from one process, which has imported what they need: a launcher's would each import it anew.

For programs of their own that tests start: a process that has computed in several threads must not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable

import torch

from model.program import ranks


def forked(processes: int, work: Callable[[], None]) -> None:
    """Runs ``work`` in so many ranks that have joined; ends this process with status 1 when one of them fails."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        with ranks.joined():
            work()

    started = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit(1)
