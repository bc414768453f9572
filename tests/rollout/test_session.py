"""Sessions: the same bits whatever runs beside them, forked or separate, and the learner's own forward agrees."""

import copy
import dataclasses

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.state import ContextFull
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.logprob import FIRST_TEXT, MODE, NEXT_TEXT
from rl.step.batch import choice_logprobs, collate
from rl.step.identity import compare
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.record.episode import Episode, concatenate
from rollout.record.transcript import write_transcript
from rollout.seeds import session_key
from rollout.turn.action import CHUNK_SAMPLES, Mode
from rollout.turn.grammar import context_rows
from rollout.turn.observation import Observation, audio_observations
from rollout.turn.vocabulary import Vocabulary
from tests.support import sessions
from tests.support.episodes import unequal_fields
from tests.support.models import fresh_model
from tests.support.sessions import record

CHUNKS = 12


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return fresh_model()


def make_engine(
    model: InteractionModel, words_per_chunk: int = 2, slots: int = 8, max_tokens: int = 256
) -> SessionEngine:
    vocabulary = Vocabulary.build(model.vocab)
    return SessionEngine(model, vocabulary, slots=slots, max_tokens=max_tokens, words_per_chunk=words_per_chunk)


def sound(session: int, chunk: int) -> Observation:
    return sessions.sound(1000 * session + chunk)


def talk(engine: SessionEngine, sessions: dict[int, Session], chunks: range) -> None:
    for k in chunks:
        engine.append(list(sessions.values()), [sound(i, k) for i in sessions])


def same(a: Episode, b: Episode) -> bool:
    return not unequal_fields(a, b)


def test_a_session_alone_equals_itself_among_others(model: InteractionModel) -> None:
    engine = make_engine(model)
    crowd = {i: engine.open(session_key(0, "x", i)) for i in range(6)}
    talk(engine, crowd, range(CHUNKS))
    other = make_engine(model)
    for i in (5, 0):
        alone = {i: other.open(session_key(0, "x", i))}
        talk(other, alone, range(CHUNKS))
        assert same(record(crowd[i]), record(alone[i]))
    stranger = {0: other.open(session_key(0, "x", 99))}
    talk(other, stranger, range(CHUNKS))
    assert not same(record(crowd[0]), record(stranger[0]))  # another key, another episode


def test_a_session_that_joins_late_is_not_changed(model: InteractionModel) -> None:
    engine, other = make_engine(model), make_engine(model)
    early = {0: engine.open(1)}
    talk(engine, early, range(3))
    late = engine.open(2)
    for k in range(CHUNKS):
        engine.append([early[0], late], [sound(0, 3 + k), sound(7, k)])
    alone = {7: other.open(2)}
    talk(other, alone, range(CHUNKS))
    assert same(record(late), record(alone[7]))


def test_fork_equals_separate(model: InteractionModel) -> None:
    engine = make_engine(model)
    origin = engine.open(11)
    talk(engine, {3: origin}, range(7))
    twin = engine.fork(origin, 11)
    branch = engine.fork(origin, 12)
    for k in range(7, CHUNKS):
        engine.append([branch, twin, origin], [sound(3, k)] * 3)
    assert same(record(origin), record(twin))
    assert not torch.equal(record(origin).tokens, record(branch).tokens)


def test_learner_forward_gives_the_sampled_bits(model: InteractionModel) -> None:
    engine = make_engine(model)
    sessions = {i: engine.open(session_key(5, "x", i)) for i in range(4)}
    talk(engine, sessions, range(CHUNKS))
    episodes = [record(s) for s in sessions.values()]
    classes = engine.vocabulary.classes

    def mismatch() -> tuple[int, int, int]:
        logprob, _, digest = choice_logprobs(model, collate(episodes, model.senses), classes, 1.0)
        result = compare(
            concatenate(episodes, "logprob"),
            logprob.detach(),
            concatenate(episodes, "digest"),
            digest,
        )
        return result.num_tokens, result.num_unequal, result.rows_unequal

    tokens, unequal, rows = mismatch()
    assert tokens > 4 * CHUNKS
    assert (unequal, rows) == (0, 0)

    weight = model.model.language_model.layers[2].self_attn.o_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():  # the negative control: one weight, one ulp
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    try:
        model.repack()
        _, unequal, rows = mismatch()
        assert unequal > 0 and rows > 0
    finally:
        with torch.no_grad():
            weight.copy_(before)
        model.repack()


def test_kept_hidden_states_are_the_learners(model: InteractionModel) -> None:
    engine = make_engine(model)
    engine.keep_hidden = True
    session = engine.open(3)
    talk(engine, {0: session}, range(CHUNKS))
    episode = record(session)
    learner = model(Inputs.cat([episode], model.senses))[episode.text.sampled_at - 1]
    assert torch.equal(torch.stack(session.hidden), learner)
    assert not torch.equal(torch.stack(session.hidden), learner.roll(1, 0))


def test_transcript_of_the_actions_is_what_the_session_wrote(model: InteractionModel) -> None:
    for words in (1, 2, 3):
        engine = make_engine(model, words)
        session = engine.open(words)
        talk(engine, {0: session}, range(CHUNKS))
        episode = record(session)
        assert Mode.SPEAK in {a.mode for a in episode.actions}
        codes = episode.codes.unflatten(0, (CHUNKS, -1))
        written = write_transcript(codes, episode.actions, engine.grammar)
        assert torch.equal(written.tokens, episode.tokens) and torch.equal(written.codes, episode.codes)
        for name in ("sampled_at", "row_class", "chunk"):
            assert torch.equal(getattr(written.text, name), getattr(episode.text, name)), name


def test_classes_follow_the_grammar(model: InteractionModel) -> None:
    engine = make_engine(model, 3)
    session = engine.open(4)
    talk(engine, {0: session}, range(CHUNKS))
    episode = record(session)
    allowed = engine.vocabulary.classes.allowed
    tokens = episode.tokens[episode.text.sampled_at]
    assert bool(allowed[episode.text.row_class, tokens].all())
    assert set(episode.text.row_class.tolist()) == {MODE, FIRST_TEXT, NEXT_TEXT}
    assert (episode.text.row_class == MODE).sum() == CHUNKS


def test_greedy_is_deterministic_and_ignores_the_key(model: InteractionModel) -> None:
    episodes = []
    for key in (1, 2):
        engine = make_engine(model)
        session = engine.open(key, temperature=0.0)
        talk(engine, {0: session}, range(4))
        episodes.append(record(session))
    assert torch.equal(episodes[0].tokens, episodes[1].tokens)


def test_sessions_of_several_temperatures_share_a_call(model: InteractionModel) -> None:
    temperatures = (1.0, 0.0, 0.3, 1.0, 0.3)
    engine, other = make_engine(model), make_engine(model)
    together = {i: engine.open(i, t) for i, t in enumerate(temperatures)}
    talk(engine, together, range(CHUNKS))
    for i, session in together.items():
        alone = {i: other.open(i, temperatures[i])}
        talk(other, alone, range(CHUNKS))
        assert same(record(session), record(alone[i])) and record(session).temperature == temperatures[i]
        other.close(alone[i])
        stranger = {i: other.open(i, temperatures[i - 1])}  # the control: the temperature of the one before
        talk(other, stranger, range(CHUNKS))
        assert not same(record(session), record(stranger[i]))
        other.close(stranger[i])
    assert engine.fork(together[2], 9).temperature == 0.3
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature is"):
            engine.open(0, wrong)


def test_a_session_is_its_own_engines_only(model: InteractionModel) -> None:
    """Refused before anything changes: another engine's session, a copy, and one whose slot has another now."""
    engine, other = make_engine(model, slots=2), make_engine(model, slots=2)
    mine, theirs, past = engine.open(1), other.open(1), engine.open(2)
    copied = copy.copy(past)
    engine.close(past)
    second = engine.open(3)
    assert second.slot == copied.slot and not copied.closed
    for stranger in (theirs, copied, copy.deepcopy(mine), dataclasses.replace(mine)):
        for use in (
            lambda one: engine.append([mine, one], [sound(0, 0)] * 2),
            lambda one: engine.check(one, sound(0, 0)),
            lambda one: engine.fork(one, 9),
            engine.close,
        ):
            with pytest.raises(ValueError, match="not this engine's own"):
                use(stranger)
    for nothing in (None, 0, "session", mine.tokens):
        with pytest.raises(ValueError, match=r"takes? its sessions, not"):
            engine.append([nothing], [sound(0, 0)])  # type: ignore[list-item]
    assert (mine.chunks, theirs.chunks, second.chunks, engine.free, other.free) == (0, 0, 0, 0, 1)
    talk(engine, {0: mine, 1: second}, range(2))  # the control
    talk(other, {0: theirs}, range(2))
    assert same(record(mine), record(theirs))


def test_a_session_can_have_as_many_chunks_as_its_engine_says(model: InteractionModel) -> None:
    engine = make_engine(model, words_per_chunk=1, max_tokens=context_rows(3, 1))
    assert engine.max_chunks == 3
    assert make_engine(model, words_per_chunk=1, max_tokens=context_rows(3, 1) - 1).max_chunks == 2
    sessions = {i: engine.open(i) for i in range(8)}
    talk(engine, sessions, range(3))
    longest = max(len(session.tokens) for session in sessions.values())
    assert longest == context_rows(3, 1), "one of them spoke in every chunk"
    with pytest.raises(ContextFull):
        talk(engine, {i: s for i, s in sessions.items() if len(s.tokens) == longest}, range(1))


def test_context_limit_is_an_error_and_moves_nothing(model: InteractionModel) -> None:
    engine = make_engine(model, max_tokens=20)
    session = engine.open(0)
    with pytest.raises(ContextFull, match="of at most 20 tokens"):
        talk(engine, {0: session}, range(CHUNKS))
    tokens = list(session.tokens)
    with pytest.raises(ContextFull):
        engine.append([session], [sound(0, 0)])
    assert session.tokens == tokens


def test_bad_audio_closed_sessions_and_full_engines_are_errors(model: InteractionModel) -> None:
    engine = make_engine(model, slots=1)
    session = engine.open(0)
    with pytest.raises(ValueError, match="0 observations for 1 sessions"):
        engine.append([session], [])
    with pytest.raises(ValueError, match="twice"):
        engine.append([session, session], [sound(0, 0)] * 2)
    with pytest.raises(ValueError, match="not finite"):
        engine.append([session], audio_observations(torch.full((1, CHUNK_SAMPLES), torch.nan)))
    for one_more in (lambda: engine.open(1), lambda: engine.fork(session, 1)):
        with pytest.raises(MetronomeError, match="all 1 slots are open"):
            one_more()
    with pytest.raises(MetronomeError, match="1 open sessions"):
        engine.publish()
    engine.close(session)
    with pytest.raises(ValueError, match="closed"):
        engine.append([session], [sound(0, 0)])
    with pytest.raises(ValueError, match="closed"):
        engine.close(session)


def test_episode_says_which_policy_sampled_it(model: InteractionModel) -> None:
    engine = make_engine(model)
    session = engine.open(0)
    talk(engine, {0: session}, range(2))
    episode = record(session)
    assert episode.contract_id == dispatch.contract_id()
    assert episode.weights_digest == engine.weights_digest
    assert dataclasses.is_dataclass(episode)
