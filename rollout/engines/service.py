"""Sessions as a service: many clients on one engine, in step with one clock.

No threads and no network here: whoever has those calls `Service.offer` when a chunk comes in and `Service.tick` every
200 ms. The rules that keep one client's trouble from the others:

- **The clock does not wait.** At a tick every session hears the chunk that is due, or silence where it is not there. A
  chunk that comes after its tick is refused; so are one that comes twice and one that comes before its turn.
- **There is a limit, and it is an error, not a crash.** The engine took the memory of all its sessions when it was made
  (`model.backbone.state`); when they are all open, one more client is told so and may come again.
- **Nothing is held for nobody.** A session that got no chunk for ``idle_chunks`` ticks, or lasted ``max_chunks``, is
  closed at that tick, and says so to the client that uses it again.
- **An error inside the engine ends the sessions that it touched** (see `rollout.engines.engine.Engine.append`): here
  all, since they move together. What can be refused before, such as sound that is no number, concerns its own client
  only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from kernels.errors import MetronomeError
from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.turn.action import CHUNK_SAMPLES, Action
from rollout.turn.observation import Observation, check_senses


class Refused(MetronomeError):
    """A client's request that was turned down; nothing has changed by it."""


class Busy(Refused):
    """All sessions are open."""


class Ended(Refused):
    """The session is closed; the message says why."""


class Late(Refused):
    """The chunk's tick is past, and silence was heard in its place."""


class Duplicate(Refused):
    """The chunk was heard, or waits to be."""


class OutOfOrder(Refused):
    """The chunk comes before its turn."""


@dataclass(eq=False)
class Client:
    """One open session as its client sees it. ``session.chunks`` is the number of the chunk that is due, from 0."""

    session: Session
    waiting: Observation | None = None  # the due chunk, if it is there
    quiet: int = 0  # ticks in a row that heard silence in a chunk's place
    missed: set[int] = field(default_factory=set)  # numbers of the chunks that did not come in time
    ended: str = ""  # why the session was closed


class Service:
    """See the module's text. The engine must have room for ``max_chunks`` micro-turns a session and be used by this
    service alone."""

    def __init__(self, engine: Engine, *, max_chunks: int, idle_chunks: int = 50) -> None:
        if max_chunks < 1 or idle_chunks < 1:
            raise ValueError(f"Service: max_chunks {max_chunks} and idle_chunks {idle_chunks} must be at least 1")
        self.engine = engine
        self.max_chunks = max_chunks
        self.idle_chunks = idle_chunks
        self.clients: list[Client] = []  # those whose sessions are open
        self._silence = Observation(torch.zeros(CHUNK_SAMPLES))

    def open(self, key: int, temperature: float = 1.0) -> Client:
        """As `rollout.engines.engine.Engine.open`; chunk 0 is heard at the next tick. Raises Busy when there is no
        room."""
        if not self.engine.free:
            raise Busy(f"all {len(self.clients)} sessions are open; come again when one has ended")
        self.clients.append(Client(self.engine.open(key, temperature)))
        return self.clients[-1]

    def offer(self, client: Client, number: int, chunk: Observation) -> None:
        """The client's chunk ``number``, to be heard at the next tick.

        Raises ValueError for sound that is no number, MissingSenseError for what the model cannot take, otherwise
        Ended, Late, Duplicate or OutOfOrder."""
        if client.ended:
            raise Ended(f"the session is closed: {client.ended}")
        check_senses(chunk)
        if not bool(chunk.audio.isfinite().all()):
            raise ValueError(f"chunk {number}: its audio has samples that are not finite")
        due = client.session.chunks
        if number in client.missed:
            raise Late(f"chunk {number} comes late: silence was heard in its place; chunk {due} is due")
        if 0 <= number < due or (number == due and client.waiting is not None):
            raise Duplicate(f"chunk {number} comes twice; it {'waits to be' if number == due else 'was'} heard")
        if number != due:
            raise OutOfOrder(f"chunk {number} does not come in order: chunk {due} is due")
        # A copy: the caller's buffer may be the next chunk's by the time of the tick.
        client.waiting = replace(chunk, audio=chunk.audio.clone())

    def tick(self) -> dict[Client, Action]:
        """One micro-turn of every session, and what each did; then the sweep. An error of the engine ends all sessions
        and is raised again; the service can be used on."""
        clients = list(self.clients)
        if not clients:
            return {}
        observations = [self._silence if c.waiting is None else c.waiting for c in clients]
        for client in clients:
            if client.waiting is None:
                client.missed.add(client.session.chunks)
                client.quiet += 1
            else:
                client.waiting, client.quiet = None, 0
        try:
            actions = self.engine.append([c.session for c in clients], observations)
        except BaseException as error:
            for client in clients:
                self._end(client, f"the engine failed ({type(error).__name__}: {error})")
            raise
        for client in clients:
            if client.quiet >= self.idle_chunks:
                self._end(client, f"no chunk came for {client.quiet} ticks")
            elif client.session.chunks >= self.max_chunks:
                self._end(client, f"it reached its limit of {self.max_chunks} chunks")
        return dict(zip(clients, actions, strict=True))

    def close(self, client: Client) -> None:
        """At the client's wish. Raises Ended when the session was closed before."""
        if client.ended:
            raise Ended(f"the session is closed: {client.ended}")
        self._end(client, "its client closed it")

    def _end(self, client: Client, why: str) -> None:
        client.ended, client.waiting = why, None
        self.clients.remove(client)
        if not client.session.closed:
            self.engine.close(client.session)
