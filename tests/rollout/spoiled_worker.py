"""A worker that misbehaves: for each task it takes the next line of the file ``$SPOIL``, which says how, or nothing."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

from rollout.engines.workers import worker
from rollout.engines.workers.task import READY, Reply, seal
from rollout.record.episode import pack_episodes, unpack_episodes


def next_kind() -> str:
    with Path(os.environ["SPOIL"]).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # workers answer at the same moment, and no two may take one line
        kind, _, rest = file.read().partition("\n")
        file.seek(0)
        file.truncate()
        file.write(rest)
    return kind


def spoiled(reply: Reply) -> bytes:
    data = seal(reply)
    match next_kind() if reply.number != READY else "":
        case "":
            return data
        case "noise":
            return os.urandom(1000)
        case "pickle":
            return pickle.dumps(reply)
        case "bit":
            return data[:5000] + bytes([data[5000] ^ 16]) + data[5001:]
        case "order":
            return seal(replace(reply, episodes=pack_episodes(unpack_episodes(reply.episodes)[::-1])))
        case "missing":
            return seal(replace(reply, episodes=pack_episodes(unpack_episodes(reply.episodes)[:-1])))
        case "another":
            return seal(replace(reply, number=reply.number + 1))
        case "half":
            os.write(int(sys.argv[1]), struct.pack("!i", len(data)) + data[:100])
            time.sleep(3600)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
    raise AssertionError("a line that says nothing known")


def main() -> None:
    worker.seal = spoiled
    worker.main()
