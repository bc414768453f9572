"""The interface of engines. An engine holds streaming sessions of one model and samples their micro-turns.

`rollout.engines.embedded.SessionEngine` runs in this process, `rollout.engines.vllm.engine.VllmEngine` on vLLM. All
engines give the same tokens and the same log-probs, bit for bit, and these are the learner's: the kernels, the sampling
keys and the contract id are shared.
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
        """Digest (`model.weights.checkpoint.weights_digest`) of the weights that new sessions are sampled from."""

    @property
    def free(self) -> int:
        """How many more sessions can be opened now."""

    @property
    def max_chunks(self) -> int:
        """How many micro-turns a session can surely have, whatever is said in them."""

    def publish(self) -> None:
        """Starts to use the model's present weights. Raises MetronomeError while sessions are open."""

    def open(self, key: int, temperature: float = 1.0) -> Session:
        """A new, empty session. ``key``: its 64-bit sampling key (`rollout.seeds.session_key`); ``temperature``: of its
        policy, 0 for greedy. Raises ValueError for another key or temperature (`check_key`, `check_temperature` in
        `rollout.engines.session`), MetronomeError when no session is free."""

    def fork(self, session: Session, key: int) -> Session:
        """A new session with the same history and temperature, and its own key. It gives the bits of a session that was
        opened separately and had this history. An engine may compute an origin and its forks once, as long as inputs
        and sampled tokens agree. Raises ValueError for what is no key, for a closed session and for another engine's,
        MetronomeError when none is free."""

    def check(self, session: Session, observation: Observation) -> None:
        """Whether ``append`` would take the observation for the session now; changes nothing. Raises ValueError for a
        session that is closed or another engine's and for audio that is no sound, MissingSenseError for an input that
        the model cannot take (`rollout.turn.observation.check_observation`), ContextFull when the context is too
        small."""

    def append(self, sessions: Sequence[Session], observations: Sequence[Observation]) -> list[Action]:
        """Runs one micro-turn of each session: ``observations[i]`` is the input of ``sessions[i]``; returns their
        actions. The sampled tokens, log-probs and row digests are added to the sessions' records.

        Raises, before any session changes, ValueError when the two differ in number or a session is repeated, and what
        ``check`` raises. After any other error the sessions of the call are closed, since they end inside a
        micro-turn."""

    def close(self, session: Session) -> None:
        """Frees the session's memory; its record stays readable. Raises ValueError when it is closed already or another
        engine's."""

    def stats(self) -> dict[str, float | int]:
        """Counters for people to read. Their names differ between engines."""
