"""Worker processes for rollouts on this machine, and the pool that supervises them.

Workers are stateless (`rollout.engines.workers.worker`), so one that dies, hangs or answers garbage is replaced, and
what it had been asked is asked of another: the episodes come out with the same bits. Each is a fresh interpreter, not a
fork, with a share of the cores. The weights lie in one memory file without a name, which each worker maps and digests
for itself; like the workers it vanishes with this process, however that ends.

Not here: more machines, queues that outlive a call, any notion of rewards or steps.
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
"""So many workers in turn are tried on one task, or may be killed before they are ready, until the pool gives up."""
PROGRAM = "from rollout.engines.workers.worker import main; main()"


class WorkerLost(Exception):
    """A worker is of no use any more; the message says what it did."""


class WorkerPool:
    """A `rollout.engines.roller.Roller`; in the end `close` it. Every process of a run owns a pool of its own."""

    def __init__(self, model: InteractionModel, setup: Setup, *, workers: int, threads: int, timeout_s: float) -> None:
        """Starts ``workers`` processes with ``threads`` threads each and waits until they are ready. Each has
        ``timeout_s`` seconds for that, and for every task later. Raises MetronomeError when they cannot start."""
        self._model = model
        self._setup = setup
        self._threads = threads
        self._timeout_s = timeout_s
        self._contract_id = dispatch.contract_id()
        self._weights = os.memfd_create("metronome-weights")
        self.weights_digest = ""  # of what lies there
        self._deaths = 0  # of workers that were never ready, since one was
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
        return [worker.process.pid for worker in self._workers]

    def publish(self) -> None:
        """Puts the model's present weights where the workers read them when they next get a task."""
        digest = checkpoint.weights_digest(self._model)
        if digest == self.weights_digest:
            return
        with open(self._weights, "wb", closefd=False) as file:
            file.seek(0)
            file.write(safetensors.torch.save(checkpoint.weights(self._model)))
            file.truncate()
        self.weights_digest = digest

    def play(self, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        """An episode of each play, in their order. Raises what a worker raised, and MetronomeError when a task loses
        one worker after the other; the pool is then closed."""
        if self._weights < 0:
            raise RuntimeError("the pool is closed")
        every = [(p.scenario, p.rollout) for p in plays]
        wanted = [PlayRequest(s.family, s.split, s.seed, rollout, s.chunks) for s, rollout in every]
        tasks = [
            Task(number, tuple(wanted[first:end]), seed, temperature, self.weights_digest)
            for number, (first, end) in enumerate(
                pairwise(task_boundaries(wanted, len(self._workers), self._setup.slots))
            )
        ]
        try:
            return self._play(tasks)
        except BaseException:  # also an interrupt: workers may still be at it
            self.close()
            raise

    def _play(self, tasks: Sequence[Task]) -> list[Episode]:
        """Returns when all workers are idle again, the new ones too."""
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
                    first, last = (f"{wanted.scenario}#{wanted.rollout}" for wanted in (task.plays[0], task.plays[-1]))
                    raise MetronomeError(
                        f"{ATTEMPTS} rollout workers in turn were lost over episodes {first} to {last}; the last one "
                        f"{result}. If memory is short, use fewer rollout.workers; if time is, raise "
                        "rollout.worker_timeout_s"
                    )
        return [episode for task in tasks for episode in done[task.number]]

    def _attend(self) -> list[tuple[Task, list[Episode] | WorkerLost]]:
        """Waits until at least one worker has something to say, and replaces the lost ones. Returns the tasks that came
        to an end, with their episodes or the reason that there are none."""
        ended: list[tuple[Task, list[Episode] | WorkerLost]] = []
        talking = wait([worker.connection for worker in self._workers])
        for i, worker in enumerate(self._workers):
            if worker.connection not in talking:
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
            for episode, wanted in zip(episodes, asked.plays, strict=True):
                check_episode(episode, wanted, asked, self._contract_id)
        except ValueError as error:
            raise WorkerLost(f"answered garbage ({error})") from error
        return episodes

    def _count_death(self, status: int, lost: WorkerLost) -> None:
        """Raises MetronomeError when workers die young: at once when one ended by itself, since so will the next."""
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
        """Ends the workers and gives the weights' memory back. Closing twice is no error."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        if self._weights >= 0:
            os.close(self._weights)
        self._weights = -1


class _Process:
    """One worker process and what it has been asked."""

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
            [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno()), str(weights)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), weights),
            env=os.environ | environment,
            process_group=0,  # Ctrl-C is for the learner, whose end ends the workers
        )
        theirs.close()
        self.asked: Setup | Task | None = None
        self.ask(setup)

    def ask(self, message: Setup | Task) -> None:
        """Sends it. When the time is up the process is killed, so that nobody waits for ever, not even in the middle
        of an answer."""
        self.asked = message
        self._watch(message)
        with contextlib.suppress(OSError):  # it is dead, which `answer` will find
            self.connection.send(message)

    def answer(self) -> Reply:
        """Raises WorkerLost when there is none or it is of something else."""
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
        """Makes sure that it has ended. Returns its exit status, negative for a signal."""
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
            if self.connection.poll():  # there is an answer, but the pool is still reading another worker's
                self._watch(message)
            else:
                self._late = True
                self.process.kill()

    def _fate(self) -> str:
        """How it ended, when its connection has closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        status = self.process.returncode
        if self._late:
            return f"gave no answer within {self._timeout_s:g} s"
        if status is None:
            return "closed its connection"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
