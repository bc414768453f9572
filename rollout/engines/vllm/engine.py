"""vLLM as an engine of streaming sessions, with the bits of the embedded engine.

A session is one resumable vLLM request. A micro-turn is one more input of it: the last sampled token (vLLM drops it at
the end of each input), a forced end token if any, and the chunk's audio; then vLLM samples until the turn ends. A fork
is a new request whose first input is the whole history; vLLM's prefix cache has the full pages of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.context import STOP, ContextConfig
from model.senses.audio import HOP, WINDOW, DMel
from model.senses.video import Patches
from model.voice.chain import draw
from rollout.engines.session import Session, check_append, check_key, check_own, check_temperature, check_turn
from rollout.engines.vllm.core import TIMEOUT_S, shared_core
from rollout.engines.vllm.items import codes_item, own_item, patches_item
from rollout.seeds import VOICE_STREAM, token_key
from rollout.turn.action import Action, Mode
from rollout.turn.grammar import AUDIO_ROWS, OWN_ROWS, Grammar, chunk_starts, context_chunks
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
        senses = model.senses
        self.grammar = Grammar(vocabulary, words_per_chunk, max_patches, max_event_words, senses.patch, own=senses.own)
        if context.policy == "summary":
            raise MetronomeError(
                "rollout.context.policy is summary, which the vllm engine does not carry out; take rollout.engine "
                "session, or policy window"
            )
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
        before = session.heard - len(starts)
        items = [codes_item(first, codes) for first, codes in zip(starts, session.codes_since(before), strict=True)]
        own = {k: codes for k, codes in session.own_since(before) if k < session.heard}
        items += [own_item(starts[k - before] + AUDIO_ROWS, codes) for k, codes in own.items()]
        for k, frames in session.frames_since(before):
            first = starts[k - before] + AUDIO_ROWS + OWN_ROWS * (k in own)
            items.append(patches_item(first, Patches.cut(frames, self.grammar.patch)))
        items.sort(key=lambda item: int(item.mm_position.offset))
        stop = list(self.grammar.stops)
        turn = self._turn(session, self.keep_hidden)
        self.core.add(session.slot, tokens, items, turn, max_tokens=self.grammar.max_sampled, stop=stop)

    def _turn(self, session: Session, keep_hidden: bool) -> dict[str, Any]:
        return {
            "key": session.key,
            "chunk": session.chunks,
            "temperature": session.temperature,
            "keep_hidden": keep_hidden,
            "free_mode": self.vocabulary.mode_id(Mode.SPEAK) if self.grammar.voice else None,
        }

    def _record(self, session: Session, tokens: list[int], record: dict[int, tuple[int, float, int, bytes]]) -> None:
        """Adds the turn's sampled tokens to the session's record."""
        for i, token in enumerate(tokens):
            drawn, logprob, digest, hidden = record[len(session.tokens)]
            if drawn != token:
                raise MetronomeError(f"vLLM returned token {token} where our sampler drew {drawn}")
            session.record_token(token, self.grammar.row_class(tokens[:i]), logprob, digest)
            if self.keep_hidden:
                session.hidden.append(self._hidden(hidden))
        session.computed = len(session.tokens) - 1  # vLLM drops the last one, so it is sent again

    def _sample_turns(self, sessions: Sequence[Session]) -> list[Action]:
        """Runs the micro-turns that were added, records what was sampled and returns the actions."""
        slots = [session.slot for session in sessions]
        sampled = self.core.run(slots)
        actions = [self.grammar.read(tokens) for tokens in sampled]
        for session, tokens, record in zip(sessions, sampled, self.core.records(slots), strict=True):
            self._record(session, tokens, record)
            session.tokens += self.grammar.forced(tokens)
        if self.grammar.voice:
            speaking = [i for i, action in enumerate(actions) if action.speaks]
            for i, sound in zip(speaking, self._sample_sound([sessions[i] for i in speaking]), strict=True):
                actions[i] = replace(actions[i], sound=sound)
        for session, action in zip(sessions, actions, strict=True):
            session.end_turn(action)
        return actions

    def _sample_sound(self, sessions: Sequence[Session]) -> list[Tensor]:
        """As `SessionEngine._sample_sound`, by our own copy of the head. vLLM computes the hidden state of each
        session's last row when it is asked for one more token, which is not used."""
        if not sessions:
            return []
        head = self.core.model.voice_head
        assert head is not None
        for session in sessions:
            tokens = session.tokens[session.computed :]
            self.core.add(session.slot, tokens, [], self._turn(session, True), max_tokens=1, stop=[])
        slots = [session.slot for session in sessions]
        self.core.run(slots)
        records = zip(sessions, self.core.records(slots), strict=True)
        rows = [self._hidden(record[len(session.tokens)][3]) for session, record in records]
        keys = [token_key(s.key, s.chunks, len(s.tokens), VOICE_STREAM) for s in sessions]
        chains = draw(head, torch.stack(rows).to(self.core.model.device), torch.tensor(keys))
        x, logprob = ops.fetch(chains.x, chains.logprob)
        for session, chain, p, d in zip(sessions, x, logprob.tolist(), chains.digest.tolist(), strict=True):
            session.computed = len(session.tokens)
            session.record_voice(chain.clone(), p, d)
        return [session.spoken[-1].sound for session in sessions]

    def _hidden(self, data: bytes) -> Tensor:
        """[D] of a record (`rollout.engines.vllm.policy.Record`)."""
        return torch.frombuffer(bytearray(data), dtype=self.core.model.dtype)
