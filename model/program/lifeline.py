"""Nothing that we start outlives us: `follow` ties a process to the one that has started it.

Every process that a launcher, a learner or a pool starts calls `follow` before it does anything else: learners,
rollout workers, vLLM's process. When the parent has ended, however it ended, the process is gone within two seconds,
and those that follow it within two more. Linux only; imports little, because it comes first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

POLL_S = 1.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h

LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
"""Set by torch's launcher and by accelerate's, which wait for what they start. ``RANK`` alone is no such sign: whoever
sets it by hand may start a run that is to live longer than the shell."""


def follow(parent: int) -> None:
    """From now on this process ends when ``parent``, the process that has started it, has ended: at once if it has
    already.

    A thread watches the parent's id. A process that is stopped or holds the interpreter's lock does not run it, so the
    kernel is asked to kill, too; but the kernel looks at the *thread* that started us, so it is asked only where that
    is the parent's main thread, whose end is the parent's."""
    if _started_by_main_thread(parent):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def follow_launcher() -> None:
    """`follow` the launcher, if one has started this process."""
    if any(name in os.environ for name in LAUNCHED):
        follow(os.getppid())


def stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal (SIGSTOP, a debugger); False for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _started_by_main_thread(parent: int) -> bool:
    """Whether the kernel lists us among the children of that thread; False where it does not tell."""
    with contextlib.suppress(OSError):
        return str(os.getpid()) in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return False
