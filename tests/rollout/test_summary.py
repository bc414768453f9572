"""Sessions that are summarised: each context is a sequence of its own, in session and learner, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.context import ContextConfig
from model.inputs import one_context
from rl.audit.diagnosis import trace
from rl.audit.replay.comparable import incomparable
from rl.step.batch import choice_logprobs, collate
from rl.step.identity import Evidence
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.record.episode import Episode, concatenate, pack_episodes, unpack_episodes
from rollout.record.transcript import from_observations
from rollout.seeds import session_key
from rollout.turn.action import LISTEN, speak
from rollout.turn.vocabulary import Vocabulary
from tests.support.episodes import unequal_fields
from tests.support.models import fresh_model
from tests.support.sessions import everything, record

CHUNKS = 24
CONTEXT = ContextConfig("summary", budget=70, request="record what you know", summary_words=5)
SIZES = {"slots": 6, "max_tokens": 80, "words_per_chunk": 2, "max_patches": 4, "max_event_words": 1}


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return fresh_model()


def make_engine(model: InteractionModel, context: ContextConfig = CONTEXT) -> SessionEngine:
    return SessionEngine(model, Vocabulary.of(model), **SIZES, context=context)


def episode(model: InteractionModel, key: int = 0, chunks: int = CHUNKS, context: ContextConfig = CONTEXT) -> Episode:
    engine = make_engine(model, context)
    session = engine.open(key)
    for k in range(chunks):
        engine.append([session], [everything(k)])
    return record(session)


def evidence(model: InteractionModel, episodes: list[Episode]) -> Evidence:
    with torch.no_grad():
        batch = collate(episodes, model.senses)
        logprob, _, digest = choice_logprobs(model, batch, Vocabulary.of(model).classes, 1.0)
    return Evidence(0, episodes, logprob, digest, len(episodes))


def test_the_learner_gives_the_bits_of_summarised_sessions(model: InteractionModel) -> None:
    seen = [episode(model, key) for key in range(3)]
    learned = evidence(model, seen)
    assert torch.equal(learned.logprob, concatenate(seen, "logprob"))
    assert torch.equal(learned.digest, concatenate(seen, "digest"))
    for one in seen:
        lengths = one.contexts.diff(append=torch.tensor([len(one.tokens)]))
        assert len(one.contexts) >= 4 and int(lengths.max()) <= CONTEXT.budget
        bos = one.tokens[one.contexts]
        assert (bos == bos[0]).all() and len(one.actions) == CHUNKS
    wrong = [replace(one, contexts=one_context()) for one in seen]  # the control: nothing is forgotten
    found = evidence(model, wrong)
    assert found.mismatch().num_unequal > 0
    first = found.first()
    assert first.position > int(seen[first.owner].contexts[1]), "the first context is the same"


def test_tokens_of_a_summary_are_learnt(model: InteractionModel) -> None:
    one = episode(model)
    begin = int(one.contexts[1])
    within = (one.text.sampled_at < begin) & (one.text.sampled_at >= begin - CONTEXT.summary_words - 1)
    summary = one.tokens[one.text.sampled_at[within]]
    vocabulary = Vocabulary.of(model)
    again = one.tokens[begin + 1 : begin + 1 + len([t for t in summary.tolist() if t != vocabulary.end])]
    assert 0 < len(again) <= CONTEXT.summary_words
    assert [t for t in summary.tolist() if t != vocabulary.end][-len(again) :] == again.tolist()


def test_forks_share_what_they_summarise_alike(model: InteractionModel) -> None:
    """Twins with one key write one summary in one slot; one with another key parts from them and equals itself alone.
    One that stays behind keeps the old context."""
    engine = make_engine(model)
    origin = engine.open(3)
    for k in range(4):
        engine.append([origin], [everything(k)])
    twin, other, late = engine.fork(origin, 3), engine.fork(origin, 4), engine.fork(origin, 3)
    for k in range(4, CHUNKS):
        engine.append([origin, twin, other], [everything(k)] * 3)
    assert origin.slot == twin.slot != other.slot and not unequal_fields(record(origin), record(twin))
    for k in range(4, CHUNKS):
        engine.append([late], [everything(k)])
    assert not unequal_fields(record(late), record(origin))
    assert not unequal_fields(record(origin), episode(model, 3))
    assert "tokens" in unequal_fields(record(other), record(origin))
    found = evidence(model, [record(s) for s in (origin, other, late)])
    assert found.mismatch().num_unequal == found.mismatch().rows_unequal == 0


def test_an_error_inside_a_summary_leaves_no_episode(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    session = engine.open(3)
    with pytest.raises(ValueError, match="no micro-turn yet"):
        record(session)
    fails = pytest.raises(ZeroDivisionError)
    monkeypatch.setattr(Session, "end_summary", lambda *_: 1 // 0)
    with fails:
        for k in range(CHUNKS):
            engine.append([session], [everything(k)])
            record(session)  # the control
    assert session.heard == session.chunks and session.closed
    with pytest.raises(ValueError, match=f"closed by an error inside chunk {session.chunks}"):
        record(session)


def test_an_episode_comes_back_and_is_comparable(model: InteractionModel) -> None:
    one = episode(model)
    (back,) = unpack_episodes(pack_episodes([one]))
    assert not unequal_fields(back, one)
    grammar = make_engine(model).grammar
    assert incomparable(back, one.weights_digest, 1.0, grammar) is None
    moved = one.contexts.clone()
    moved[1] += 1
    other = replace(back, contexts=moved)
    assert incomparable(other, one.weights_digest, 1.0, grammar) is not None
    assert incomparable(back, one.weights_digest, 1.0, replace(grammar, summary=None)) is not None
    longer = replace(grammar, summary=replace(grammar.summary, budget=71))  # type: ignore[type-var]
    assert incomparable(back, one.weights_digest, 1.0, longer) is not None or len(one.contexts) == 1


def test_a_demonstration_repeats_what_was_said(model: InteractionModel) -> None:
    grammar = make_engine(model).grammar
    actions = [speak("breathe") if k % 4 == 1 else LISTEN for k in range(CHUNKS)]
    written = from_observations([everything(k) for k in range(CHUNKS)], actions, grammar)
    assert len(written.contexts) >= 3
    v, begin = grammar.vocabulary, int(written.contexts[1])
    count = sum(action.speaks for action in actions[: int(written.text.chunk[written.text.sampled_at < begin][-1])])
    assert written.tokens[begin + 1 : begin + 1 + min(count, 5)].tolist() == [v.word_id("breathe")] * min(count, 5)
    with torch.no_grad():
        logprob, _, _ = choice_logprobs(model, collate([written], model.senses), v.classes, 1.0)
    assert logprob.isfinite().all()


def test_a_difference_is_traced_through_contexts(model: InteractionModel) -> None:
    """The replayed sampler restarts where the session did, so both traces have the same bits throughout."""
    key = session_key(0, "x/train/0", 0)  # of `record`
    one, classes = episode(model, key, 12), Vocabulary.of(model).classes
    sampled, learned = trace.sampler(model, [one], 0, classes), trace.learner(model, [one], 0, classes)
    assert len(one.contexts) > 1
    for name in (trace.LOGPROB, trace.DIGEST):
        assert torch.equal(sampled.entries[name].rows, learned.entries[name].rows)


def test_a_session_may_go_on_for_ever(model: InteractionModel) -> None:
    engine = make_engine(model)
    assert engine.max_chunks > 10**9
    session = engine.open(0)
    for k in range(80):  # of which a state of 80 tokens without summaries holds seven
        engine.append([session], [everything(k)])
    assert len(session.tokens) > 5 * SIZES["max_tokens"]


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (replace(CONTEXT, budget=28), "budget is 28: .* takes up to 29 tokens"),
        (replace(CONTEXT, budget=200), "budget is 200, but max_tokens is 80"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(model: InteractionModel, context: ContextConfig, says: str) -> None:
    with pytest.raises(MetronomeError, match=says):
        make_engine(model, context)
