"""What runs in a rollout worker; `rollout.engines.workers.pool` starts it.

Stateless given (weights, scenario ids, rollout indices, seed, temperature): nothing of one task enters the next, so a
task gives the same episodes in any worker and any order. It makes its own scenarios, from ids. Weights are read from
memory shared with the learner. An idle worker waits in the kernel; when the connection closes, because its pool closed
or the learner's process is gone, it ends at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue

import safetensors.torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from rollout.engines.embedded import SessionEngine
from rollout.engines.workers.task import Reply, Setup, Task, seal
from rollout.play import Play, play
from rollout.record.episode import Episode, pack_episodes
from rollout.world.speech import SpeechBank


class Worker:
    """Owns a copy of the model and an engine on it."""

    def __init__(self, setup: Setup, weights: int) -> None:
        """``weights``: descriptor of the memory file that holds them. Raises MetronomeError for bad recordings."""
        self._setup = setup
        self._weights = f"/proc/self/fd/{weights}"
        self._bank = SpeechBank.load(setup.speech_dir)
        self._model = InteractionModel(setup.config, setup.dtype)
        self._engine: SessionEngine | None = None

    def roll(self, task: Task) -> list[Episode]:
        """The task's episodes in order. Raises MetronomeError when the shared weights are not those of the task."""
        engine = self._prepared(task.weights_digest)
        config = self._setup.scenarios
        scenarios = {w.scenario: config.scenario(w.family, w.split, w.seed, self._bank) for w in task.plays}
        return play(engine, [Play(scenarios[w.scenario], w.rollout) for w in task.plays], task.seed, task.temperature)

    def _prepared(self, weights_digest: str) -> SessionEngine:
        """The engine, at the weights of that digest; it takes the digest of what it holds itself."""
        if self._engine is None:
            safetensors.torch.load_model(self._model, self._weights)
            self._model.pack()
            self._engine = SessionEngine.of(self._model, self._setup, self._setup.slots)
        elif self._engine.weights_digest != weights_digest:
            safetensors.torch.load_model(self._model, self._weights)
            self._model.mark_changed()
            self._engine.publish()
        if self._engine.weights_digest != weights_digest:
            raise MetronomeError(
                f"a rollout worker read weights with digest {self._engine.weights_digest}, but the learner published "
                f"{weights_digest}: the memory they share is damaged. Resume the run from its newest checkpoint"
            )
        return self._engine


def main() -> None:
    """Answers messages until the connection closes. Arguments: descriptors of the connection and of the weights."""
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
        except (
            Exception
        ) as error:  # whatever it is, it would come again in any other worker: the learner shall raise it
            error.add_note(f"In a rollout worker:\n{traceback.format_exc()}")
            reply = Reply(message.number, dispatch.contract_id(), error=error)
        with contextlib.suppress(ConnectionError):  # the pool is gone: `_listen` knows
            connection.send_bytes(seal(reply))


def _listen(connection: Connection, inbox: SimpleQueue[Setup | Task]) -> None:
    """Passes messages on; ends the process when there will be no more."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)
