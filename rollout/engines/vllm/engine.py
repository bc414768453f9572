"""vLLM as an engine of streaming sessions, with the bits of the embedded engine.

A session is one resumable vLLM request. A micro-turn is one more input of it: the last sampled token (vLLM drops it at
the end of each input), a forced end token if any, and the chunk's audio; then vLLM samples until the turn ends. A fork
is a new request whose first input is the whole history; vLLM's prefix cache has the full pages of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.context import STOP, ContextConfig
from model.senses.audio import HOP, WINDOW, DMel
from model.senses.video import Patches
from rollout.engines.session import Session, check_append, check_key, check_own, check_temperature, check_turn
from rollout.engines.vllm.core import TIMEOUT_S, shared_core
from rollout.engines.vllm.items import codes_item, patches_item
from rollout.turn.action import Action
from rollout.turn.grammar import AUDIO_ROWS, Grammar, chunk_starts, context_chunks, row_class
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary


class VllmEngine:
    """Sessions of one model in vLLM; implements `rollout.engines.engine.Engine`. The arguments are explained at
    `rollout.engines.embedded.SessionEngine` and `Core`. Engines with equal arguments share one vLLM."""

    def __init__(
        self,
        model: InteractionModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        max_tokens: int,
        words_per_chunk: int = 1,
        max_patches: int = 0,
        max_event_words: int = 0,
        context: ContextConfig = STOP,
        keep_hidden: bool = False,
        worker_process: bool = False,
        prefix_cache: bool = True,
        prefill_tokens: int = 2048,
        pages: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        sizes = {"slots": slots, "max_tokens": max_tokens, "prefill_tokens": prefill_tokens, "pages": pages}
        for name, size in sizes.items():
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"VllmEngine: {name} is {size!r}; it must be a whole number (int), at least 1")
        self.grammar = Grammar(vocabulary, words_per_chunk, max_patches, max_event_words, model.senses.patch)
        if context.policy == "summary":
            raise MetronomeError(
                "rollout.context.policy is summary, which the vllm engine does not carry out; take rollout.engine "
                "session, or policy window"
            )
        if model.voice_head is not None:
            raise MetronomeError("the vllm engine samples no sound, but the model has a voice: rollout.engine session")
        self.core = shared_core(
            model,
            vocabulary,
            slots=slots,
            max_tokens=max_tokens,
            max_patches=max_patches,
            worker_process=worker_process,
            prefix_cache=prefix_cache,
            prefill_tokens=prefill_tokens,
            pages=pages,
            timeout_s=timeout_s,
        )
        self.vocabulary = vocabulary
        self.dmel = DMel.build()
        self.max_tokens = max_tokens
        self.keep_hidden = keep_hidden
        self._opened: set[Session] = set()  # this engine's, of those that are open in the core

    @property
    def weights_digest(self) -> str:
        return self.core.weights_digest

    @property
    def free(self) -> int:
        return self.core.free

    @property
    def max_chunks(self) -> int:
        return context_chunks(self.max_tokens, self.grammar.words_per_chunk, self.grammar.extra)

    def publish(self) -> None:
        """See `Engine.publish`. Sessions must be closed because their KV cache was computed with the old weights."""
        if self.core.begun:
            raise MetronomeError(
                f"weights were changed under {len(self.core.begun)} open sessions; close them before publishing"
            )
        self.core.model.repack()
        self.core.publish()

    def open(self, key: int, temperature: float = 1.0) -> Session:
        """See `Engine.open`."""
        check_key(key)
        check_temperature(temperature)
        slot = self.core.take()
        return self._register(Session.begin(slot, key, temperature, self.weights_digest, self.vocabulary.bos))

    def fork(self, session: Session, key: int) -> Session:
        """See `Engine.fork`."""
        check_key(key)
        check_own(session, self._opened)
        return self._register(session.forked(self.core.take(), key))

    def close(self, session: Session) -> None:
        """See `Engine.close`."""
        check_own(session, self._opened)
        self.core.drop(session.slot)
        session.closed = True
        self._opened.remove(session)

    def check(self, session: Session, observation: Observation) -> None:
        """See `Engine.check`."""
        check_turn(session, observation, self._opened, self.grammar, self.max_tokens)

    @torch.inference_mode()
    def append(self, sessions: Sequence[Session], observations: Sequence[Observation]) -> list[Action]:
        """See `Engine.append`."""
        check_append(self.check, sessions, observations)
        parts = [part for s, o in zip(sessions, observations, strict=True) for part in (s.last_samples, o.audio)]
        samples = torch.cat(parts).view(len(sessions), -1)
        codes = self.dmel.stream_codes(samples)
        try:
            for session, observation, audio, chunk_codes in zip(sessions, observations, samples, codes, strict=True):
                session.add_observation(audio[-(WINDOW - HOP) :], chunk_codes, observation, self.grammar)
                self._add(session)
            return self._sample_turns(sessions)
        except BaseException:
            for session in sessions:
                self.close(session)
            self.core.forget_pages()
            raise

    def stats(self) -> dict[str, float | int]:
        return {"sessions_open": len(self.core.begun), "sessions_free": self.free, "steps": self.core.steps}

    def _register(self, session: Session) -> Session:
        self._opened.add(session)
        return session

    def _add(self, session: Session) -> None:
        """Sends vLLM the tokens, codes and patches that it does not have yet: at a session's first input, all."""
        begin = session.computed if self.core.begun[session.slot] else 0
        tokens = session.tokens[begin:]
        starts = chunk_starts(tokens, self.vocabulary.audio)
        turn = {
            "key": session.key,
            "chunk": session.chunks,
            "temperature": session.temperature,
            "keep_hidden": self.keep_hidden,
        }
        before = session.heard - len(starts)
        items = [codes_item(first, codes) for first, codes in zip(starts, session.codes_since(before), strict=True)]
        for k, frames in session.frames_since(before):
            items.append(patches_item(starts[k - before] + AUDIO_ROWS, Patches.cut(frames, self.grammar.patch)))
        items.sort(key=lambda item: int(item.mm_position.offset))
        stop = list(self.grammar.stops)
        self.core.add(session.slot, tokens, items, turn, max_tokens=self.grammar.max_sampled, stop=stop)

    def _record(self, session: Session, tokens: list[int], record: dict[int, tuple[int, float, int, bytes]]) -> None:
        """Adds the turn's sampled tokens to the session's record."""
        for i, token in enumerate(tokens):
            drawn, logprob, digest, hidden = record[len(session.tokens)]
            if drawn != token:
                raise MetronomeError(f"vLLM returned token {token} where our sampler drew {drawn}")
            session.record_token(token, row_class(i), logprob, digest)
            if self.keep_hidden:
                session.hidden.append(torch.frombuffer(bytearray(hidden), dtype=self.core.model.dtype))
        session.computed = len(session.tokens) - 1  # vLLM drops the last one, so it is sent again

    def _sample_turns(self, sessions: Sequence[Session]) -> list[Action]:
        """Runs the micro-turns that were added, records what was sampled and returns the actions."""
        slots = [session.slot for session in sessions]
        sampled = self.core.run(slots)
        for session, tokens, record in zip(sessions, sampled, self.core.records(slots), strict=True):
            self._record(session, tokens, record)
            session.tokens += self.grammar.forced(tokens)
            session.end_turn(self.grammar.read(tokens))
        return [session.actions[-1] for session in sessions]
