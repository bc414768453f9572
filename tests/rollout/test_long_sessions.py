"""Sessions several times as long as what their model attends to: the learner's forward over the whole episode gives the
sampled bits of every token, of sessions, their forks and their repetition; another window does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.layout import SPLIT_TOKENS
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.context import ContextConfig, give
from rl.step.batch import choice_logprobs, collate
from rollout.engines.embedded import SessionEngine
from rollout.record.episode import Episode, concatenate
from rollout.seeds import session_key
from rollout.turn.grammar import context_rows
from rollout.turn.vocabulary import Vocabulary
from tests.support import sessions
from tests.support.episodes import unequal_fields
from tests.support.sessions import record

FIRST, WINDOW = 64, 128
BUDGET = FIRST + WINDOW
FORK_AT, CHUNKS = 65, 116  # at least 5 rows a chunk


def make(context: ContextConfig) -> InteractionModel:
    model = InteractionModel(give(preset("tiny"), context))
    model.init_weights(0)
    model.requires_grad_(False)
    model.pack()
    return model


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return make(ContextConfig("window", FIRST, WINDOW))


@pytest.fixture(scope="module")
def episodes(model: InteractionModel) -> list[Episode]:
    """Of a session, two forks of it with its key and with another, and a session beside them."""
    engine = engine_of(model, slots=4)
    origin, other = (engine.open(session_key(0, "x", i)) for i in range(2))
    for k in range(FORK_AT):
        engine.append([origin, other], [sessions.sound(k), sessions.sound(1000 + k)])
    assert engine.state.global_pages_freed > 0
    before = len(origin.tokens)
    twin, branch = engine.fork(origin, origin.key), engine.fork(origin, session_key(0, "x", 9))
    for k in range(FORK_AT, CHUNKS):
        heard = [sessions.sound(k)] * 3 + [sessions.sound(1000 + k)]
        engine.append([twin, branch, origin, other], heard)
    assert before > BUDGET + 2 * SPLIT_TOKENS and len(origin.tokens) > 3 * BUDGET
    return [record(session) for session in (origin, twin, branch, other)]


def engine_of(model: InteractionModel, slots: int) -> SessionEngine:
    rows = context_rows(CHUNKS, 2)
    return SessionEngine(model, Vocabulary.build(model.vocab), slots=slots, max_tokens=rows, words_per_chunk=2)


def learned(model: InteractionModel, episodes: list[Episode]) -> tuple[Tensor, Tensor]:
    """(log-probs, digests of rows) of all sampled tokens, by one forward over whole sequences."""
    classes = Vocabulary.build(model.vocab).classes
    logprob, _, digest = choice_logprobs(model, collate(episodes, model.senses), classes, 1.0)
    return logprob, digest


def test_the_learner_gives_the_sampled_bits(model: InteractionModel, episodes: list[Episode]) -> None:
    logprob, digest = learned(model, episodes)
    assert len(digest) > 4 * CHUNKS
    assert torch.equal(logprob, concatenate(episodes, "logprob"))
    assert torch.equal(digest, concatenate(episodes, "digest"))


def test_forks_and_repetitions(model: InteractionModel, episodes: list[Episode]) -> None:
    origin, twin, branch, other = episodes
    assert not unequal_fields(origin, twin)
    assert not torch.equal(origin.tokens, branch.tokens)
    engine = engine_of(model, slots=1)  # alone, as a worker that takes a lost one's task
    again = engine.open(session_key(0, "x", 1))
    for k in range(CHUNKS):
        engine.append([again], [sessions.sound(1000 + k)])
    assert not unequal_fields(record(again), other)


@pytest.mark.parametrize(
    "context",
    [
        ContextConfig(),
        ContextConfig("window", FIRST, WINDOW + SPLIT_TOKENS),
        ContextConfig("window", FIRST + SPLIT_TOKENS, WINDOW),
    ],
    ids=["none", "a page longer", "a page more kept"],
)
def test_control_of_another_window(context: ContextConfig, episodes: list[Episode]) -> None:
    """The same weights with another window: equal as long as nothing is dropped, and unequal later."""
    episode = episodes[0]
    logprob, digest = learned(make(context), [episode])
    early = episode.text.sampled_at <= BUDGET  # predicted by the row before
    assert torch.equal(logprob[early], episode.text.logprob[early])
    assert torch.equal(digest[early], episode.text.digest[early])
    differs = digest != episode.text.digest
    assert float(differs[~early].float().mean()) > 0.9 and bool((logprob != episode.text.logprob)[~early].any())


def test_memory_does_not_grow_with_the_session(model: InteractionModel) -> None:
    """What a state of a session a hundred times as long allocates beside the page tables is the same."""
    sizes = []
    for chunks in (CHUNKS, 100 * CHUNKS):
        engine = SessionEngine(model, Vocabulary.build(model.vocab), slots=1, max_tokens=context_rows(chunks, 2))
        sizes.append([layer.kv.key.shape for layer in engine.state.layers])
    assert sizes[0] == sizes[1]
