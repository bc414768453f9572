"""A pool of rollout worker processes on this machine.

Workers are stateless (`rollout.engines.workers.worker`). One that dies, hangs or returns damaged data is replaced and
its task is given to another, which returns episodes with the same bits. Each worker is a fresh interpreter, not a fork,
with a share of the cores. Weights are in an anonymous memory file, which every worker reads and digests; like the
workers, it disappears with this process, however that ends.

Limits: one machine, no queue beyond a call; no knowledge of rewards or training steps.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import wait

import safetensors.torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.weights import checkpoint
from rollout.engines.workers.task import PlayRequest, Reply, Setup, Task, check_episode, task_boundaries, unseal
from rollout.play import Play
from rollout.record.episode import Episode, unpack_episodes

ATTEMPTS = 5
"""The pool raises when it has lost so many workers in succession with one task, or before they were ready."""
PROGRAM = """
import sys
from model.program.lifeline import follow
follow(int(sys.argv[3]))
from rollout.engines.workers.worker import main
main()
"""


class WorkerLost(Exception):
    """A worker cannot be used any more. The message continues "it …"."""


class WorkerPool:
    """Implements `rollout.engines.roller.Roller` with worker processes. `close` it after use. In a run of several ranks
    each rank has a pool."""

    def __init__(self, model: InteractionModel, setup: Setup, *, workers: int, threads: int, timeout_s: float) -> None:
        """Starts ``workers`` processes with ``threads`` threads each and waits until they are ready. ``timeout_s``:
        seconds that a worker may take for its start, and for a task. Raises MetronomeError when they cannot start."""
        self._model = model
        self._setup = setup
        self._threads = threads
        self._timeout_s = timeout_s
        self._contract_id = dispatch.contract_id()
        self._weights = os.memfd_create("metronome-weights")
        self.weights_digest = ""  # of the weights in the memory file
        self._deaths = 0  # workers lost before they were ready, since the last one that was ready
        self._workers: list[_Process] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
            self._play([])
            self.publish()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def publish(self) -> None:
        """Writes the model's present weights to the memory file; workers read it at their next task."""
        digest = checkpoint.weights_digest(self._model)
        if digest == self.weights_digest:
            return
        with open(self._weights, "wb", closefd=False) as file:
            file.seek(0)
            file.write(safetensors.torch.save(checkpoint.weights(self._model)))
            file.truncate()
        self.weights_digest = digest

    def play(self, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        """One episode for each play, in order. Raises what a worker raised, MetronomeError when a task has lost
        `ATTEMPTS` workers, and RuntimeError after `close`. Any error closes the pool."""
        if self._weights < 0:
            raise RuntimeError("the pool is closed")
        requests = [
            PlayRequest(p.scenario.family, p.scenario.split, p.scenario.seed, p.rollout, p.scenario.chunks)
            for p in plays
        ]
        boundaries = task_boundaries(requests, len(self._workers), self._setup.slots)
        tasks = [
            Task(number, tuple(requests[first:end]), seed, temperature, self.weights_digest)
            for number, (first, end) in enumerate(pairwise(boundaries))
        ]
        try:
            return self._play(tasks)
        except BaseException:  # also KeyboardInterrupt: workers may still be computing
            self.close()
            raise

    def _play(self, tasks: Sequence[Task]) -> list[Episode]:
        """The tasks' episodes. Returns when all workers are idle, also those that were started meanwhile."""
        waiting, lost = deque(tasks), Counter[int]()
        done: dict[int, list[Episode]] = {}
        while len(done) < len(tasks) or any(worker.asked for worker in self._workers):
            for worker in self._workers:
                if worker.asked is None and waiting:
                    worker.ask(waiting.popleft())
            for task, result in self._attend():
                if not isinstance(result, WorkerLost):
                    done[task.number] = result
                    continue
                waiting.appendleft(task)
                lost[task.number] += 1
                if lost[task.number] == ATTEMPTS:
                    first, last = (f"{play.scenario}#{play.rollout}" for play in (task.plays[0], task.plays[-1]))
                    raise MetronomeError(
                        f"{ATTEMPTS} rollout workers in turn were lost over episodes {first} to {last}; the last one "
                        f"{result}. If memory is short, use fewer rollout.workers; if time is, raise "
                        "rollout.worker_timeout_s"
                    )
        return [episode for task in tasks for episode in done[task.number]]

    def _attend(self) -> list[tuple[Task, list[Episode] | WorkerLost]]:
        """Waits until at least one worker has answered or ended, and replaces those that were lost. Returns the tasks
        that these workers had, with their episodes or the reason of the loss."""
        ended: list[tuple[Task, list[Episode] | WorkerLost]] = []
        ready = wait([worker.connection for worker in self._workers])
        for i, worker in enumerate(self._workers):
            if worker.connection not in ready:
                continue
            asked = worker.asked
            try:
                episodes = self._accept(worker.answer(), asked)
                if isinstance(asked, Task):
                    ended.append((asked, episodes))
            except WorkerLost as lost:
                status = worker.end()
                if isinstance(asked, Setup):
                    self._count_death(status, lost)
                if isinstance(asked, Task):
                    ended.append((asked, lost))
                self._workers[i] = self._start()
        return ended

    def _accept(self, reply: Reply, asked: Setup | Task | None) -> list[Episode]:
        """The reply's episodes. Raises WorkerLost if they are not those asked for, and the worker's own error."""
        if reply.error is not None:
            raise reply.error
        if reply.contract_id != self._contract_id:
            raise MetronomeError(
                f"a rollout worker computes under contract {reply.contract_id}, this process under "
                f"{self._contract_id}; choose the backend by METRONOME_BACKEND and METRONOME_ISA, which both read"
            )
        if not isinstance(asked, Task):
            self._deaths = 0
            return []
        try:
            episodes = unpack_episodes(reply.episodes)
            for episode, request in zip(episodes, asked.plays, strict=True):
                check_episode(episode, request, asked, self._contract_id, self._model.sound_steps)
        except ValueError as error:
            raise WorkerLost(f"answered garbage ({error})") from error
        return episodes

    def _count_death(self, status: int, lost: WorkerLost) -> None:
        """Counts a worker lost before it was ready. Raises MetronomeError after `ATTEMPTS` of them; at once when it
        exited by itself, because the next one would too."""
        self._deaths += 1
        if status > 0 or self._deaths == ATTEMPTS:
            times = f"{self._deaths} in turn were lost" if self._deaths > 1 else "one was lost"
            raise MetronomeError(
                f"rollout workers cannot start: {times} before it was ready; it {lost}. What it printed stands above; "
                "rollout.workers 0 rolls out in this process"
            )

    def _start(self) -> _Process:
        return _Process(self._weights, self._threads, self._timeout_s, self._setup)

    def close(self) -> None:
        """Ends the workers and frees the weights' memory. May be called twice."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        if self._weights >= 0:
            os.close(self._weights)
        self._weights = -1


class _Process:
    """One worker process, and the message that it has not answered yet."""

    def __init__(self, weights: int, threads: int, timeout_s: float, setup: Setup) -> None:
        self.connection, theirs = Pipe()
        self._timeout_s = timeout_s
        self._late = False
        environment = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",  # threads without work sleep, whatever the learner's own do
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno()), str(weights), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), weights),
            env=os.environ | environment,
            process_group=0,  # Ctrl-C is for the learner, whose end ends the workers
        )
        theirs.close()
        self.asked: Setup | Task | None = None
        self.ask(setup)

    def ask(self, message: Setup | Task) -> None:
        """Sends the message and starts a timer that kills the process when no complete answer comes in time."""
        self.asked = message
        self._watch(message)
        with contextlib.suppress(OSError):  # it is dead, which `answer` will find
            self.connection.send(message)

    def answer(self) -> Reply:
        """The reply to the last message. Raises WorkerLost when it is damaged, missing or to another message."""
        try:
            reply = unseal(self.connection.recv_bytes())
        except ValueError as error:
            raise WorkerLost(f"answered garbage ({error})") from error
        except (EOFError, OSError) as error:
            raise WorkerLost(self._fate()) from error
        if self.asked is None or reply.number != self.asked.number:
            raise WorkerLost("answered what it had not been asked")
        self._timer.cancel()
        self.asked = None
        return reply

    def end(self) -> int:
        """Kills the process if it still runs. Returns its exit status, negative for a signal."""
        self._timer.cancel()
        self.connection.close()
        self.process.kill()
        return self.process.wait()

    def _watch(self, message: Setup | Task) -> None:
        self._timer = threading.Timer(self._timeout_s, self._give_up, (message,))
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self, message: Setup | Task) -> None:
        if self.asked is not message:
            return
        with contextlib.suppress(OSError):  # closed: the pool has given up already
            if self.connection.poll():  # it has answered, but the pool is still reading another worker's answer
                self._watch(message)
            else:
                self._late = True
                self.process.kill()

    def _fate(self) -> str:
        """How the process ended, after its connection was closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        status = self.process.returncode
        if self._late:
            return f"gave no answer within {self._timeout_s:g} s"
        if status is None:
            return "closed its connection"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
