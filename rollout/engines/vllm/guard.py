"""vLLM's own process, when it has one: it ends with ours, and it is named when it dies, stops or no longer answers.

vLLM's client notices a death but wakes nobody who waits for an output, and of a process that is stopped it notices
nothing. `Guard` looks at the process from a thread and makes every wait end with a `MetronomeError`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kernels.errors import MetronomeError
from model.program import lifeline

STOPPED_S = 10.0
"""A process that was stopped by a signal is given so long to go on, while somebody waits for it."""
LOOK_S = 0.5
CURE = "Its sessions are gone; a run goes on from its newest checkpoint with --resume"

_run_engine_core: Any = None
"""vLLM's program of its process, while `run_engine_core` stands in for it; None in a process that was spawned."""


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """vLLM's process, tied to ours. What it keeps in files while it starts lies in the folder that it is started
    from."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    lifeline.follow(parent.pid)
    tempfile.tempdir = os.environ["VLLM_RPC_BASE_PATH"]
    from vllm.v1.engine.core import EngineCoreProc

    (_run_engine_core or EngineCoreProc.run_engine_core)(*args, **kwargs)


@contextmanager
def starting(timeout_s: float) -> Iterator[None]:
    """Start vLLM's process in this context: it will follow ours. Raises MetronomeError when it ends before it is ready
    or is not ready after ``timeout_s``."""
    global _run_engine_core
    from vllm.v1.engine.core import EngineCoreProc

    late = threading.Event()
    others = {process.pid for process in multiprocessing.active_children()}

    def give_up() -> None:
        late.set()
        for process in multiprocessing.active_children():
            if process.pid not in others:
                process.kill()

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    _run_engine_core = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)  # type: ignore[method-assign]
    try:
        timer.start()
        yield
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        fate = f"was not ready after {timeout_s:g} s" if late.is_set() else "ended before it was ready"
        raise MetronomeError(f"vLLM's process {fate}; what it printed stands above") from error
    finally:
        timer.cancel()
        EngineCoreProc.run_engine_core = staticmethod(_run_engine_core)  # type: ignore[method-assign]
        _run_engine_core = None


class Guard:
    """Watches the process of ``client``, vLLM's SyncMPClient, until `stop`."""

    def __init__(self, client: Any, timeout_s: float) -> None:
        """``timeout_s``: seconds that the process may take for an answer."""
        self.lost = ""  # what became of the process, once it is of no more use
        self._client = client
        self._process = client.resources.engine_manager.processes[0]
        self._timeout_s = timeout_s
        self._since: float | None = None  # when the present wait began
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="vllm-guard", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Call vLLM in this context. Raises MetronomeError when its process is, or gets, lost."""
        if self.lost:
            raise MetronomeError(self.lost)
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:
            if self._client.resources.engine_dead and not self.lost:  # vLLM has noticed before us
                self._process.join(2 * LOOK_S)
                self._lose(self._ended() or "has failed; what it printed stands above")
            if self.lost:
                raise MetronomeError(self.lost) from error
            raise
        finally:
            self._since = None

    def _watch(self) -> None:
        running = time.monotonic()  # when the process was last seen not to be stopped
        while not self._stopped.wait(LOOK_S) and not self.lost:
            now, since = time.monotonic(), self._since
            if since is None or not lifeline.stopped(self._process.pid):
                running = now
            if ended := self._ended():
                self._lose(ended)
            elif now - running > STOPPED_S:
                self._lose(f"was stopped by a signal and has not gone on for {STOPPED_S:g} s")
            elif since is not None and now - since > self._timeout_s:
                self._lose(f"gave no answer within {self._timeout_s:g} s (rollout.worker_timeout_s)")

    def _ended(self) -> str:
        code = self._process.exitcode
        if code is None:
            return ""
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _lose(self, fate: str) -> None:
        """Gives the process up and ends every wait for it."""
        if self._stopped.is_set() or self.lost:
            return
        self.lost = f"vLLM's process (pid {self._process.pid}) {fate}. {CURE}"
        self._client.resources.engine_dead = True
        self._process.kill()
        for future in list(self._client.utility_results.values()):
            if not future.done():
                future.set_exception(MetronomeError(self.lost))
        self._client.outputs_queue.put_nowait(MetronomeError(self.lost))
