"""Sessions of many live clients on one engine, driven by one clock.

There are no threads and no network in this module: its caller has those, and calls `Service.offer` when a chunk arrives
and `Service.tick` every 200 ms. Rules that isolate clients from each other:

- **The clock does not wait.** At a tick every session is given the chunk that is due, or silence if it has not arrived.
  Chunks that are late, duplicates or out of order are refused.
- **A full engine is an error, not a crash.** The engine allocates the memory of all its sessions at its start
  (`model.backbone.state`); when all are open, a further client is refused and may try again later.
- **Idle sessions are closed**, at the tick at which no chunk has come for ``idle_chunks`` ticks or ``max_chunks`` is
  reached. A client that uses a closed session is told why it was closed.
- **One client's input never ends another's session.** Every argument is checked by the engine's own check
  (`Engine.check` in `rollout.engines.engine`): when it is offered, and before the tick, where a session that cannot go
  on ends alone. What is left are defects: an error inside the engine ends all sessions, since they are computed
  together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernels.errors import MetronomeError
from model.backbone.state import ContextFull
from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.turn.action import CHUNK_SAMPLES, Action
from rollout.turn.observation import Observation


class Refused(MetronomeError):
    """A client's request was refused; nothing has changed."""


class Busy(Refused):
    """All sessions are open."""


class Ended(Refused):
    """The session is closed; the message says why."""


class Late(Refused):
    """The chunk's tick is past; the model was given silence in its place."""


class Duplicate(Refused):
    """The chunk arrived before."""


class OutOfOrder(Refused):
    """The chunk is not the one that is due."""


@dataclass(eq=False)
class Client:
    """One open session as its client sees it. ``session.chunks`` is the number of the chunk that is due, from 0."""

    session: Session
    waiting: Observation | None = None  # the due chunk, if it has arrived
    quiet: int = 0  # successive ticks without a chunk
    missed: set[int] = field(default_factory=set)  # numbers of the chunks that were replaced by silence
    ended: str = ""  # why the session was closed


class Service:
    """Sessions of many clients; see the module's docstring. Only this service may use the engine. Raises ValueError for
    limits below 1, and for more ``max_chunks`` than a session of the engine has room for."""

    def __init__(self, engine: Engine, *, max_chunks: int, idle_chunks: int = 50) -> None:
        for name, value in (("max_chunks", max_chunks), ("idle_chunks", idle_chunks)):
            if type(value) is not int or value < 1:
                raise ValueError(f"Service: {name} is {value!r}; it must be a whole number (int), at least 1")
        if max_chunks > engine.max_chunks:
            raise ValueError(
                f"Service: max_chunks is {max_chunks}, but a session of this engine has room for {engine.max_chunks}; "
                "give at most so many, or make the engine with more max_tokens (rollout.turn.grammar.context_rows)"
            )
        self.engine = engine
        self.max_chunks = max_chunks
        self.idle_chunks = idle_chunks
        self.clients: list[Client] = []  # those whose sessions are open
        self._silence = Observation(torch.zeros(CHUNK_SAMPLES))

    def open(self, key: int, temperature: float = 1.0) -> Client:
        """As `rollout.engines.engine.Engine.open`; chunk 0 is due at the next tick. Raises Busy when no session is
        free."""
        if not self.engine.free:
            raise Busy(f"all {len(self.clients)} sessions are open; come again when one has ended")
        self.clients.append(Client(self.engine.open(key, temperature)))
        return self.clients[-1]

    def offer(self, client: Client, number: int, chunk: Observation) -> None:
        """Takes the client's chunk ``number`` (from 0) for the next tick.

        Raises what `Engine.check` raises, ValueError for a number that is no ``int``, Refused for another service's
        client, and Ended, Late, Duplicate or OutOfOrder."""
        self._check_client(client)
        if type(number) is not int or number.bit_length() > 63:
            raise ValueError(f"a chunk's number is a whole number (int) of 64 bits, not a {type(number).__name__} here")
        self.engine.check(client.session, chunk)
        due = client.session.chunks
        if number in client.missed:
            raise Late(f"chunk {number} comes late: silence was heard in its place; chunk {due} is due")
        if 0 <= number < due or (number == due and client.waiting is not None):
            raise Duplicate(f"chunk {number} comes twice; it {'waits to be' if number == due else 'was'} heard")
        if number != due:
            raise OutOfOrder(f"chunk {number} does not come in order: chunk {due} is due")
        # A copy: the caller's buffer may be the next chunk's by the time of the tick.
        client.waiting = Observation(chunk.audio.clone())

    def tick(self) -> dict[Client, Action]:
        """Runs one micro-turn of every session and returns the actions; then closes sessions that are idle or too long.
        A session that the engine cannot go on with is closed before, alone. If the engine raises, all sessions are
        closed and the error is raised; the service remains usable."""
        for client in list(self.clients):
            try:
                self.engine.check(client.session, client.waiting or self._silence)
            except (ValueError, MetronomeError, ContextFull) as error:
                self._end(client, f"the engine cannot go on with it ({error})")
        clients = list(self.clients)
        if not clients:
            return {}
        observations = [client.waiting or self._silence for client in clients]
        for client in clients:
            if client.waiting is None:
                client.missed.add(client.session.chunks)
                client.quiet += 1
            else:
                client.waiting, client.quiet = None, 0
        try:
            actions = self.engine.append([c.session for c in clients], observations)
        except BaseException as error:
            for client in clients:  # each is told, also if the engine can close none of them any more
                client.ended = f"the engine failed ({type(error).__name__}: {error})"
            for client in clients:
                self._end(client, client.ended)
            raise
        for client in clients:
            if client.quiet >= self.idle_chunks:
                self._end(client, f"no chunk came for {client.quiet} ticks")
            elif client.session.chunks >= self.max_chunks:
                self._end(client, f"it reached its limit of {self.max_chunks} chunks")
        return dict(zip(clients, actions, strict=True))

    def close(self, client: Client) -> None:
        """Closes the client's session. Raises Ended when it is closed already, Refused for another service's client."""
        self._check_client(client)
        self._end(client, "its client closed it")

    def _check_client(self, client: Client) -> None:
        if isinstance(client, Client) and client.ended:
            raise Ended(f"the session is closed: {client.ended}")
        if not any(client is one for one in self.clients):
            raise Refused("this service has no such client; `Service.open` gives one")

    def _end(self, client: Client, why: str) -> None:
        client.ended, client.waiting = why, None
        self.clients.remove(client)
        if not client.session.closed:
            self.engine.close(client.session)
