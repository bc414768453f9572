"""vLLM with a model that remembers the first tokens and a window: the embedded engine's bits, and so the learner's.
vLLM keeps all pages, since it frees none; the kernels look at those that are in sight."""

from __future__ import annotations

import pytest

from model.backbone.transformer import InteractionModel
from model.config import preset
from model.context import ContextConfig, give
from rollout.engines.embedded import SessionEngine
from rollout.turn.vocabulary import Vocabulary

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from rollout.engines.vllm.engine import VllmEngine  # noqa: E402
from tests.rollout.vllm import test_identity  # noqa: E402
from tests.rollout.vllm.test_identity import against_learner, play, unequal  # noqa: E402

SIZES = test_identity.SIZES | {"max_tokens": 640}


def of(context: ContextConfig) -> InteractionModel:
    model = InteractionModel(give(preset("tiny"), context))
    model.init_weights(0)
    model.requires_grad_(False)
    model.pack()
    return model


def test_a_window_in_global_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_identity, "CHUNKS", 45)
    model = of(ContextConfig("window", first=64, window=64))
    vocabulary = Vocabulary.build(model.vocab)
    engine = SessionEngine(model, vocabulary, **SIZES)
    sessions = play(engine, 6)
    assert engine.state.global_pages_freed >= 6
    assert against_learner(model, sessions, vocabulary)[1:] == (0, 0)
    vllm = VllmEngine(model, vocabulary, **SIZES)
    got = play(vllm, 6)
    vllm.core.close()
    assert unequal(got, sessions) == 0
    whole = play(SessionEngine(of(ContextConfig()), vocabulary, **SIZES), 6)  # the control
    assert unequal(got, whole) == len(got)
