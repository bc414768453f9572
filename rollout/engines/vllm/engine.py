"""vLLM as an engine of streaming sessions: the scale-out one, bit for bit the embedded one.

A session is one resumable vLLM request. A micro-turn is its next input: the last sampled token, which vLLM drops at the
end of each input, a forced end, the chunk's audio; then vLLM samples until the turn ends. A fork is a new request that
brings the whole past with it with its first input; vLLM's prefix cache spares it what is in full pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.senses.audio import HOP, WINDOW, DMel
from rollout.engines.session import Session, check_append, check_temperature
from rollout.engines.vllm.core import shared_core
from rollout.turn.action import Action
from rollout.turn.grammar import Grammar, chunk_starts, row_class
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary


class VllmEngine:
    """Sessions of one model in vLLM; see `rollout.engines.embedded.SessionEngine` for the first arguments, `Core` for
    the rest. Engines of one model with equal arguments share one vLLM."""

    def __init__(
        self,
        model: InteractionModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        max_tokens: int,
        words_per_chunk: int = 1,
        keep_hidden: bool = False,
        worker_process: bool = False,
        prefix_cache: bool = True,
        prefill_tokens: int = 2048,
        pages: int | None = None,
    ) -> None:
        self.grammar = Grammar(vocabulary, words_per_chunk)
        self.core = shared_core(
            model,
            vocabulary,
            slots=slots,
            max_tokens=max_tokens,
            worker_process=worker_process,
            prefix_cache=prefix_cache,
            prefill_tokens=prefill_tokens,
            pages=pages,
        )
        self.vocabulary = vocabulary
        self.dmel = DMel.build()
        self.max_tokens = max_tokens
        self.keep_hidden = keep_hidden

    @property
    def weights_digest(self) -> str:
        return self.core.weights_digest

    @property
    def free(self) -> int:
        return self.core.free

    def publish(self) -> None:
        """Takes over the model's new weights. Every session must be closed: its keys belong to the old ones."""
        if self.core.begun:
            raise MetronomeError(
                f"weights were changed under {len(self.core.begun)} open sessions; close them before publishing"
            )
        self.core.model.repack()
        self.core.publish()

    def open(self, key: int, temperature: float = 1.0) -> Session:
        """A new session that has heard nothing. Raises ValueError for a temperature that is no number from 0 on,
        MetronomeError when every slot is taken."""
        check_temperature(temperature)
        return Session(
            slot=self.core.take(),
            key=key,
            temperature=temperature,
            weights_digest=self.weights_digest,
            tokens=[self.vocabulary.bos],
            last_samples=torch.zeros(WINDOW - HOP),
        )

    def fork(self, session: Session, key: int) -> Session:
        """A session with the same past and temperature and another key."""
        session.check_open()
        return session.forked(self.core.take(), key)

    def close(self, session: Session) -> None:
        """Gives the slot back. Closing twice is an error; the session's record stays readable."""
        session.check_open()
        self.core.drop(session.slot)
        session.closed = True

    @torch.inference_mode()
    def append(self, sessions: Sequence[Session], observations: Sequence[Observation]) -> list[Action]:
        """One micro-turn of each session; see `rollout.engines.engine.Engine.append`, also for the errors."""
        check_append(sessions, observations, self.grammar.max_rows, self.max_tokens)
        parts = [part for s, o in zip(sessions, observations, strict=True) for part in (s.last_samples, o.audio)]
        samples = torch.cat(parts).view(len(sessions), -1)
        codes = self.dmel.stream_codes(samples)
        try:
            for session, sound, heard in zip(sessions, samples, codes, strict=True):
                session.add_observation(sound[-(WINDOW - HOP) :], heard, self.grammar.observed)
                self._add(session)
            return self._sample_turns(sessions)
        except BaseException:
            for session in sessions:
                self.close(session)
            self.core.forget_pages()
            raise

    def stats(self) -> dict[str, float | int]:
        return {"sessions_open": len(self.core.begun), "sessions_free": self.free, "steps": self.core.steps}

    def _add(self, session: Session) -> None:
        """Hands vLLM what it does not have yet: everything, the first time."""
        begin = session.computed if self.core.begun[session.slot] else 0
        tokens = session.tokens[begin:]
        heard = chunk_starts(tokens, self.vocabulary.audio)
        ask = {
            "key": session.key,
            "chunk": session.chunks,
            "temperature": session.temperature,
            "keep_hidden": self.keep_hidden,
        }
        codes = session.codes[len(session.codes) - len(heard) :]
        heard_codes = list(zip(heard, codes, strict=True))
        most, stop = self.grammar.max_sampled, list(self.grammar.stops)
        self.core.add(session.slot, tokens, heard_codes, ask, most_tokens=most, stop=stop)

    def _record(self, session: Session, tokens: list[int], record: dict[int, tuple[int, float, int, bytes]]) -> None:
        """Adds the turn's sampled tokens to the session's record."""
        for i, token in enumerate(tokens):
            drawn, logprob, digest, hidden = record[len(session.tokens)]
            if drawn != token:
                raise MetronomeError(f"vLLM returned token {token} where our sampler drew {drawn}")
            session.record_token(token, row_class(i), logprob, digest)
            if self.keep_hidden:
                session.hidden.append(torch.frombuffer(bytearray(hidden), dtype=self.core.model.dtype))
        session.computed = len(session.tokens) - 1  # vLLM drops the last one, to be fed again

    def _sample_turns(self, sessions: Sequence[Session]) -> list[Action]:
        """The micro-turn after its audio: what vLLM sampled, booked."""
        slots = [session.slot for session in sessions]
        sampled = self.core.run(slots)
        for session, tokens, record in zip(sessions, sampled, self.core.records(slots), strict=True):
            self._record(session, tokens, record)
            session.end_turn(self.grammar.read(tokens), self.grammar.forced(tokens))
        return [session.actions[-1] for session in sessions]
