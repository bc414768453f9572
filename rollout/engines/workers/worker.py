"""The program of a rollout worker process; `rollout.engines.workers.pool` starts it.

A worker is stateless: a task's episodes depend only on the task and the weights, so they are the same in any worker and
any order. It makes scenarios from their ids, and reads weights from memory shared with the learner. An idle worker uses
no processor time. When the connection closes, because the pool or the learner's process has ended, it ends at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.size import empty
from model.weights import checkpoint
from rollout.engines.embedded import SessionEngine
from rollout.engines.workers.task import Reply, Setup, Task, seal
from rollout.play import Play, play
from rollout.record.episode import Episode, pack_episodes
from rollout.world.speech import SpeechBank


class Worker:
    """Owns packed copies of the model's weights, and an engine on them."""

    def __init__(self, setup: Setup, weights: int) -> None:
        """``weights``: file descriptor of the memory file with the weights. Raises SpeechError for bad recordings."""
        self._setup = setup
        self._weights = Path(f"/proc/self/fd/{weights}")
        self._bank = SpeechBank.open(setup.speech_dir)
        self._model = empty(setup.config, setup.dtype)  # gets packed copies only: a worker changes no weight
        self._model.tokenizer = setup.tokenizer
        self._engine: SessionEngine | None = None

    def roll(self, task: Task) -> list[Episode]:
        """The task's episodes in order. Raises MetronomeError when the shared weights are not those of the task."""
        engine = self._prepared(task.weights_digest)
        config = self._setup.scenarios
        scenarios = {w.scenario: config.scenario(w.family, w.split, w.seed, self._bank) for w in task.plays}
        return play(engine, [Play(scenarios[w.scenario], w.rollout) for w in task.plays], task.seed, task.temperature)

    def _prepared(self, weights_digest: str) -> SessionEngine:
        """The engine, with the weights of that digest, loaded if it has others. The digest is computed here."""
        if self._engine is None:
            checkpoint.read_packs(self._model, self._weights)
            self._engine = SessionEngine.of(self._model, self._setup, self._setup.slots)
        elif self._engine.weights_digest != weights_digest:
            checkpoint.read_packs(self._model, self._weights)
            self._engine.publish()
        if self._engine.weights_digest != weights_digest:
            raise MetronomeError(
                f"a rollout worker read weights with digest {self._engine.weights_digest}, but the learner published "
                f"{weights_digest}: the memory they share is damaged. Resume the run from its newest checkpoint"
            )
        return self._engine


def main() -> None:
    """Answers messages until the connection closes. Command line: file descriptors of the connection and the
    weights."""
    connection, weights = Connection(int(sys.argv[1])), int(sys.argv[2])
    inbox: SimpleQueue[Setup | Task] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    worker: Worker | None = None
    while True:
        message = inbox.get()
        try:
            episodes: list[Episode] = []
            if isinstance(message, Setup):
                worker = Worker(message, weights)
            else:
                assert worker is not None, "the first message is a Setup"
                episodes = worker.roll(message)
            reply = Reply(message.number, dispatch.contract_id(), pack_episodes(episodes))
        except Exception as error:  # it would occur in every worker, so the learner raises it
            error.add_note(f"In a rollout worker:\n{traceback.format_exc()}")
            reply = Reply(message.number, dispatch.contract_id(), error=error)
        with contextlib.suppress(ConnectionError):  # the pool is gone: `_listen` knows
            connection.send_bytes(seal(reply))


def _listen(connection: Connection, inbox: SimpleQueue[Setup | Task]) -> None:
    """Puts messages into the inbox; ends the process when the connection closes."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)
