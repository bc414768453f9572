"""vLLM against the embedded engine and the learner: zero unequal tokens and rows, whatever vLLM does in between.

Every case compares whole session records (tokens, log-prob bits, row digests, hidden states, actions) with those of the
embedded engine, and the latter are what the learner's forward gives. Sixteen sessions run at once through chunks of
audio, several pages long; the cases differ in what vLLM is allowed: small steps (chunked prefill), prefix cache, and
preemption in the middle of a turn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import ops
from kernels.errors import MetronomeError
from model.backbone.state import ContextFull
from model.backbone.transformer import InteractionModel
from rl.step.batch import choice_logprobs, collate
from rl.step.identity import compare
from rollout.engines.embedded import SessionEngine
from rollout.engines.engine import Engine
from rollout.engines.service import Service
from rollout.engines.session import Session
from rollout.record.episode import concatenate
from rollout.seeds import session_key
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.observation import MissingSenseError, Observation, audio_observations
from rollout.turn.vocabulary import Vocabulary
from tests.kernels.contract import uneven
from tests.support.models import fresh_model
from tests.support.sessions import record

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from rollout.engines.vllm.engine import VllmEngine  # noqa: E402

SESSIONS, CHUNKS = 16, 20
SIZES = {"slots": 20, "max_tokens": 320, "words_per_chunk": 3, "keep_hidden": True}
SMALL_STEP = 24
"""Rows in one step: sixteen chunks of audio take several, and a page of a fork's past too."""


def sound(chunk: int) -> list[Observation]:
    generator = torch.Generator().manual_seed(chunk)
    return audio_observations(0.1 * torch.randn(SESSIONS, CHUNK_SAMPLES, generator=generator))


def talk(engine: Engine, sessions: list[Session], chunks: range) -> None:
    for k in chunks:
        engine.append(sessions, sound(k)[: len(sessions)])


def play(engine: Engine, count: int = SESSIONS) -> list[Session]:
    """``count`` sessions; after two thirds every fourth one is forked, and the forks go on beside them."""
    sessions = [engine.open(session_key(0, "x", i)) for i in range(count)]
    part = 2 * CHUNKS // 3
    talk(engine, sessions, range(part))
    forks = [engine.fork(s, session_key(1, "x", i)) for i, s in enumerate(sessions[::4])]
    talk(engine, sessions, range(part, CHUNKS))
    talk(engine, forks, range(part, CHUNKS))
    for session in sessions + forks:
        engine.close(session)
    return sessions + forks


def play_mixed(engine: Engine, temperatures: tuple[float, ...], together: bool) -> list[Session]:
    """A session of each temperature, all in one call or one after another."""
    sessions = [engine.open(i, t) for i, t in enumerate(temperatures)]
    for some in [sessions] if together else [[session] for session in sessions]:
        for k in range(6):
            engine.append(some, sound(k)[:1] * len(some))
    for session in sessions:
        engine.close(session)
    return sessions


def unequal(a: list[Session], b: list[Session]) -> int:
    """How many of the sessions differ in anything."""
    names = ("tokens", "computed", "sampled", "logprob", "digest", "actions", "weights_digest", "temperature")
    differs = 0
    for x, y in zip(a, b, strict=True):
        equal = all(getattr(x, name) == getattr(y, name) for name in names)
        hidden = len(x.hidden) == len(y.hidden) and all(map(torch.equal, x.hidden, y.hidden))
        differs += not (equal and hidden and torch.equal(x.codes, y.codes))
    return differs


def against_learner(model: InteractionModel, sessions: list[Session], vocabulary: Vocabulary) -> tuple[int, int, int]:
    """Tokens, unequal log-probs and unequal rows in one teacher-forced forward over all sessions."""
    episodes = [record(session) for session in sessions]
    batch = collate(episodes, model.senses)
    with torch.no_grad():
        logprob, _, digest = choice_logprobs(model, batch, vocabulary.classes, 1.0)
    result = compare(concatenate(episodes, "logprob"), logprob, concatenate(episodes, "digest"), digest)
    return result.num_tokens, result.num_unequal, result.rows_unequal


class Embedded:
    """One model, and what the embedded engine makes of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = fresh_model(dtype=dtype)
        self.vocabulary = Vocabulary.build(self.model.vocab)
        self.sessions = play(SessionEngine(self.model, self.vocabulary, **SIZES))

    def vllm(self, **options: object) -> VllmEngine:
        return VllmEngine(self.model, self.vocabulary, **SIZES, **options)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def embedded(request: pytest.FixtureRequest) -> Embedded:
    return Embedded(getattr(torch, request.param))


@pytest.fixture(scope="module")
def fp32() -> Embedded:
    return Embedded(torch.float32)


def test_the_learner_agrees(embedded: Embedded) -> None:
    tokens, unequal_tokens, unequal_rows = against_learner(embedded.model, embedded.sessions, embedded.vocabulary)
    assert tokens > 20 * CHUNKS
    assert (unequal_tokens, unequal_rows) == (0, 0)


@pytest.mark.parametrize("prefill_tokens", [2048, SMALL_STEP], ids=["whole", "chunked"])
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"])
def test_in_process(embedded: Embedded, prefix_cache: bool, prefill_tokens: int) -> None:
    engine = embedded.vllm(prefix_cache=prefix_cache, prefill_tokens=prefill_tokens)
    sessions = play(engine)
    assert unequal(sessions, embedded.sessions) == 0
    assert against_learner(embedded.model, sessions, embedded.vocabulary)[1:] == (0, 0)
    alone = play(engine, 1)  # its fork too
    assert unequal(alone, [embedded.sessions[0], embedded.sessions[SESSIONS]]) == 0
    engine.core.close()


def test_sessions_of_several_temperatures_share_a_call(fp32: Embedded) -> None:
    temperatures = (1.0, 0.0, 0.3, 1.0, 0.3)
    engine, embedded = fp32.vllm(), SessionEngine(fp32.model, fp32.vocabulary, **SIZES)
    together = play_mixed(engine, temperatures, together=True)
    assert unequal(together, play_mixed(engine, temperatures, together=False)) == 0
    assert unequal(together, play_mixed(embedded, temperatures, together=True)) == 0
    others = play_mixed(engine, temperatures[::-1], together=True)  # the control: its ends change, its middle does not
    assert [a.digest == b.digest for a, b in zip(together, others, strict=True)] == [False, False, True, False, False]
    engine.core.close()


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cached", "uncached"])
def test_preemption(embedded: Embedded, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few steps vLLM throws every running sequence's pages away, in the middle of turns and of prefills; not for
    ever, since in small steps nobody would get to the end of the past that is computed again."""
    engine = embedded.vllm(prefix_cache=prefix_cache, prefill_tokens=SMALL_STEP)
    client = engine.core.client
    scheduler, honest, preempted = client.engine_core.scheduler, client.get_output, []

    def disturbed() -> object:
        output = honest()
        if engine.core.steps % 17 == 3 and len(preempted) < 4 * SESSIONS:
            while scheduler.running:
                preempted.append(scheduler.running.pop())
                scheduler._preempt_request(preempted[-1], time.monotonic(), drop_stale_output=True)
            scheduler.prev_step_scheduled_req_ids.clear()
        return output

    monkeypatch.setattr(client, "get_output", disturbed)
    sessions = play(engine)
    assert len(preempted) > SESSIONS
    assert unequal(sessions, embedded.sessions) == 0
    engine.core.close()


def test_worker_process(embedded: Embedded) -> None:
    engine = embedded.vllm(worker_process=True, prefill_tokens=SMALL_STEP)
    assert unequal(play(engine), embedded.sessions) == 0
    alone = play(engine, 1)
    assert unequal(alone, [embedded.sessions[0], embedded.sessions[SESSIONS]]) == 0
    changed_weights(embedded, engine)
    engine.core.close()


def changed_weights(embedded: Embedded, engine: VllmEngine) -> None:
    """One weight moves by one ulp: after `publish` both engines follow, and neither repeats the old episode."""
    weight = embedded.model.model.language_model.layers[2].self_attn.o_proj.weight
    before = weight[0, 0].clone()
    old = engine.weights_digest
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(before, torch.full_like(before, torch.inf))
    try:
        engine.publish()
        other = SessionEngine(embedded.model, embedded.vocabulary, **SIZES)
        assert engine.weights_digest == other.weights_digest != old
        changed = play(engine, 1)
        assert unequal(changed, play(other, 1)) == 0
        assert changed[0].weights_digest == engine.weights_digest
        assert changed[0].digest != embedded.sessions[0].digest
    finally:
        with torch.no_grad():
            weight[0, 0] = before
        engine.publish()
    assert engine.weights_digest == old
    assert unequal(play(engine, 1), [embedded.sessions[0], embedded.sessions[SESSIONS]]) == 0


@pytest.fixture
def engine(fp32: Embedded) -> Iterator[VllmEngine]:
    engine = fp32.vllm()
    yield engine
    engine.core.close()


def test_published_weights_are_sampled_from(fp32: Embedded, engine: VllmEngine) -> None:
    play(engine, 4)  # fills the prefix cache and the encoder cache with what the old weights made
    changed_weights(fp32, engine)


def test_naive_linear_is_caught(fp32: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in one layer on vLLM's side whose bits depend on how many rows run beside: it shows."""
    naive_model = fresh_model(dtype=torch.float32)
    target = naive_model.layers[1].self_attn.packed.out
    honest = ops.linear
    variant = uneven(honest)

    def linear(x: torch.Tensor, packed: object, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return (variant if packed is target else honest)(x, packed, out_dtype)

    monkeypatch.setattr(ops, "linear", linear)
    engine = VllmEngine(naive_model, fp32.vocabulary, **SIZES)
    sessions = play(engine)
    assert unequal(sessions, fp32.sessions) > 0
    tokens, _, unequal_rows = against_learner(fp32.model, sessions, fp32.vocabulary)
    assert 0 < unequal_rows <= tokens
    engine.core.close()


def test_refusals(fp32: Embedded, engine: VllmEngine) -> None:
    session = engine.open(1)
    with pytest.raises(MetronomeError, match="1 open sessions"):
        engine.publish()
    with pytest.raises(ValueError, match="2 observations for 1 sessions"):
        engine.append([session], sound(0)[:2])
    with pytest.raises(MissingSenseError, match=r"its text events have 2 words, .* room for 0"):
        engine.append([session], [replace(sound(0)[0], events=("a result",))])
    sessions = [session] + [engine.open(i) for i in range(engine.free)]
    with pytest.raises(MetronomeError, match="all 20 sessions are open"):
        engine.open(0)
    for other in sessions[1:]:
        engine.close(other)
    with pytest.raises(ContextFull, match="of at most 320 tokens"):
        talk(engine, [session], range(100))
    assert engine.free == 19  # and it has not moved
    engine.close(session)
    with pytest.raises(ValueError, match="closed"):
        engine.append([session], sound(0)[:1])
    assert engine.stats()["sessions_open"] == 0


def test_one_clients_input_is_its_own(fp32: Embedded, engine: VllmEngine) -> None:
    """What `Service.offer` refuses for one client, by the check that `append` makes; and whose session it is."""
    other, embedded = fp32.vllm(), SessionEngine(fp32.model, fp32.vocabulary, **SIZES)
    assert other.core is engine.core and other is not engine
    assert engine.max_chunks == embedded.max_chunks
    with pytest.raises(ValueError, match="has room for"):
        Service(engine, max_chunks=engine.max_chunks + 1)
    service = Service(engine, max_chunks=3)
    client, loud = service.open(1), service.open(2)
    for key in ("1", 1.0, True, -1, 2**64):
        with pytest.raises(ValueError, match="key is a whole number"):
            service.open(key)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="full scale is 1"):
        service.offer(loud, 0, Observation(torch.full((3200,), 2.4e16)))
    strangers = (embedded.open(1), other.open(3), copy.copy(client.session))
    for stranger in strangers:
        for use in (
            lambda one: engine.append([client.session, one], sound(0)[:2]),
            lambda one: engine.fork(one, 9),
            engine.close,
        ):
            with pytest.raises(ValueError, match="not this engine's own"):
                use(stranger)
    with pytest.raises(ValueError, match="not this engine's own"):
        embedded.append([client.session], sound(0)[:1])
    service.offer(client, 0, sound(0)[0])  # the control
    assert list(service.tick()) == [client, loud]
    alone = embedded.open(1)
    embedded.append([alone], sound(0)[:1])
    embedded.close(alone)
    assert unequal([alone], [client.session]) == 0
    other.close(strangers[1])
    service.close(client)
    service.close(loud)
    assert engine.stats()["sessions_open"] == 0


def test_a_second_vllm_in_this_process_is_refused(fp32: Embedded, engine: VllmEngine) -> None:
    """Whichever ended first would take the other with it. One that shares the first one's settings shares it."""
    with pytest.raises(MetronomeError, match="already runs in this process"):
        fp32.vllm(prefix_cache=False)
    assert fp32.vllm().core is engine.core
    assert unequal(play(engine, 1), [fp32.sessions[0], fp32.sessions[SESSIONS]]) == 0


def test_after_one_ended_an_equal_one_starts_anew(fp32: Embedded, engine: VllmEngine) -> None:
    """Though somebody still holds the one that ended."""
    engine.core.close()
    again = fp32.vllm()
    assert again.core is not engine.core
    assert unequal(play(again, 1), [fp32.sessions[0], fp32.sessions[SESSIONS]]) == 0
    again.core.close()


def test_the_process_is_left_as_it_was(fp32: Embedded) -> None:
    function, state, threads = torch.set_num_threads, torch.get_rng_state(), torch.get_num_threads()
    fp32.vllm().core.close()
    assert torch.set_num_threads is function
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
