"""What the rest of the program knows of an engine: something that holds streaming sessions of one model.

`rollout.engines.embedded.SessionEngine` is the one embedded in this process. An engine is built around a
model; `publish` takes over that model's weights as they are now. Every engine is bit for bit the learner: same
kernels, same sampling keys, same contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout.engines.session import Session
from rollout.turn.action import Action
from rollout.turn.observation import Observation


class Engine(Protocol):
    """Sessions are the engine's own: only the one that opened a session may append to, fork or close it."""

    @property
    def weights_digest(self) -> str:
        """Digest of the weights that sessions opened now are sampled from."""

    @property
    def free(self) -> int:
        """How many more sessions can be opened now."""

    def publish(self) -> None:
        """Takes over the model's present weights. Raises MetronomeError while sessions are open."""

    def open(self, key: int, temperature: float = 1.0) -> Session:
        """A session that has heard nothing; ``key`` is its 64-bit sampling key (`rollout.seeds.session_key`),
        ``temperature`` that of its policy, 0 for greedy. Raises ValueError for a temperature that is no number from 0
        on, MetronomeError when no session is free."""

    def fork(self, session: Session, key: int) -> Session:
        """A session with the same past and temperature and another key; its bits are those of a separate one. Sessions
        with one past may be computed once, for as long as they hear and say the same. Raises MetronomeError when none
        is free."""

    def append(self, sessions: Sequence[Session], observations: Sequence[Observation]) -> list[Action]:
        """One micro-turn of each session, which gets the observation at its place; returns what each did. The records
        of the sessions then hold the sampled tokens, their log-probs and row digests.

        Raises ValueError for another number of observations, sound that is no number, a closed session or one that
        comes twice, MissingSenseError for what the model cannot take, ContextFull when a session would outgrow its
        context; then no session has moved. After any other error the sessions of the call are closed, so that none goes
        on from half a micro-turn."""

    def close(self, session: Session) -> None:
        """Gives the session's memory back; its record stays readable. Closing twice is an error."""

    def stats(self) -> dict[str, float | int]:
        """What the engine has done so far, for people to read; the names are the engine's own."""
