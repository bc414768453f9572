"""Sessions far longer than what a model with a window in its global layers attends to: one function still, bit for bit,
on every hidden row, with pages given away; what the config says of it, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import MetronomeError
from model import config as shapes
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.context import ContextConfig, check_same, give
from model.weights import checkpoint
from tests.model.cases import in_pieces, random_rows, twins, whole

FIRST, WINDOW = 64, 64
BUDGET = FIRST + WINDOW  # the most rows that a row of a global layer attends to
ROWS = 3 * BUDGET + 70


def windowed(
    seed: int, first: int = FIRST, window: int = WINDOW, dtype: torch.dtype = torch.float32
) -> InteractionModel:
    """The model of `twins`, its global layers with a window; with log scaling for some seeds."""
    ours, _ = twins(seed, dtype)
    model = InteractionModel(give(ours.config, ContextConfig("window", first, window)), dtype)
    model.load_state_dict(ours.state_dict())
    model.pack()
    return model


def state_of(model: InteractionModel, slots: int = 3) -> SessionState:
    return SessionState(model.config, slots, 10**5, model.dtype, max_rows=ROWS)


def cuts(seed: int, rows: int) -> list[int]:
    """Random lengths that sum to ``rows``."""
    choose, lengths = random.Random(seed), []
    while (left := rows - sum(lengths)) > 0:
        lengths.append(min(left, choose.choice([1, 2, 5, 63, 64, 130])))
    return lengths


@settings(max_examples=6)
@given(
    st.integers(0, 5), st.sampled_from([0, 64, 128]), st.sampled_from([64, 128, 192]), st.booleans(), st.integers(0, 99)
)
def test_one_function(seed: int, first: int, window: int, short: bool, cut: int) -> None:
    """Whole, in pieces of any lengths, and row by row; a fork after rows were dropped; and a session that was closed,
    its rows read again in other pieces, and went on."""
    model = windowed(seed, first, window, torch.bfloat16 if short else torch.float32)
    rows = random_rows(seed, ROWS)
    learner, state = whole(model, rows), state_of(model)
    for lengths in ([ROWS], cuts(cut, ROWS), [1] * ROWS):
        slot = state.open()
        assert torch.equal(in_pieces(model, rows, lengths, state, slot), learner), lengths
        state.close(slot)
    assert state.global_pages_freed > 0

    origin, at = state.open(), ROWS - 100 + cut
    in_pieces(model, rows.cut(0, at), cuts(cut + 1, at), state, origin)
    twin = state.fork(origin)
    in_pieces(model, random_rows(seed + 1, ROWS).cut(at, ROWS), [ROWS - at], state, twin)  # another future
    second = state.fork(origin)
    rest = rows.cut(at, ROWS)
    assert torch.equal(in_pieces(model, rest, cuts(cut + 2, ROWS - at), state, origin), learner[at:])
    state.close(origin)
    assert torch.equal(in_pieces(model, rest, [1] * (ROWS - at), state, second), learner[at:])
    state.close(second)
    again = state.open()
    in_pieces(model, rows.cut(0, at), cuts(cut + 3, at), state, again)
    assert torch.equal(in_pieces(model, rest, [ROWS - at], state, again), learner[at:])


@pytest.mark.parametrize("seed", range(3))
def test_control_of_the_window(seed: int) -> None:
    """Without a window, and with one a page longer or a page more kept, all rows up to the budget are the same and a
    later one is not: the comparison sees what was dropped."""
    model, rows = windowed(seed), random_rows(seed, ROWS)
    learner = whole(model, rows)
    others: list[Callable[[], InteractionModel]] = [
        lambda: twins(seed)[0],
        lambda: windowed(seed, FIRST, WINDOW + 64),
        lambda: windowed(seed, FIRST + 64, WINDOW),
    ]
    for other in others:
        got = whole(other(), rows)
        assert torch.equal(got[:BUDGET], learner[:BUDGET])
        assert bool((got[BUDGET:] != learner[BUDGET:]).any())


def test_factors_beyond_every_table() -> None:
    """tau is that of the number of keys seen, so it stops growing where the window is full, at any position."""
    text = twins(0)[0].config.text_config
    text.log_scaling_n_floor, text.log_scaling_alpha = 20, 0.1
    text.global_window, text.global_first = WINDOW, FIRST
    table = shapes.log_scale_table(text)
    assert table is not None and len(table) == BUDGET
    position = torch.tensor([0, 30, BUDGET - 1, BUDGET, 10**9], dtype=torch.int32)
    assert torch.equal(shapes.log_scale(text, table, position), table[[0, 30, BUDGET - 1, BUDGET - 1, BUDGET - 1]])
    text.global_window = text.global_first = None
    without = shapes.log_scale_table(text)
    assert without is not None and len(without) == text.max_position_embeddings
    assert torch.equal(without[:BUDGET], table) and bool(without[BUDGET] > table[-1])
    with pytest.raises(IndexError):
        shapes.log_scale(text, without, torch.tensor([text.max_position_embeddings]))


def test_the_policy_is_in_the_config(tmp_path: Path) -> None:
    """It is saved and loaded with the model, enters the digest, and no transformers' field is touched."""
    model = windowed(0)
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert shapes.global_sight(loaded.text) == (WINDOW, FIRST)
    assert checkpoint.weights_digest(loaded) == checkpoint.weights_digest(model)
    plain = checkpoint.load(tmp_path / "model", context=ContextConfig())
    assert shapes.global_sight(plain.text) == (None, 0)
    longer = checkpoint.load(tmp_path / "model", context=ContextConfig("window", FIRST, WINDOW + 64))
    assert len({checkpoint.weights_digest(m) for m in (model, plain, longer)}) == 3
    assert checkpoint.weights_digest(plain) == checkpoint.weights_digest(twins(0)[0])
    assert not checkpoint.config_differences(plain.config, twins(0)[0].config)
    assert checkpoint.config_differences(plain.config, model.config) == [
        "text_config.global_first: wanted None, stored 64",
        "text_config.global_window: wanted None, stored 64",
    ]


def test_what_is_refused(tmp_path: Path) -> None:
    model = windowed(0)
    checkpoint.save(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    stored = json.loads(path.read_text())
    for changed, message in (
        ({"global_window": 100}, "global_window is 100: give a number from 64 to 16,777,216, a multiple of 64"),
        ({"global_window": 0}, "global_window is 0"),
        ({"global_first": -64}, "global_first is -64"),
        ({"global_first": True}, "global_first is True: give a number"),
        ({"global_window": "far"}, "global_window is 'far'"),
        ({"global_window": None}, "global_first is 64, but there is no global_window"),
    ):
        path.write_text(json.dumps(stored | {"text_config": stored["text_config"] | changed}))
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load(tmp_path / "model")
    assert shapes.global_sight(give(model.config, ContextConfig("summary")).text_config) == (None, 0)
    check_same(model.config, ContextConfig("window", FIRST, WINDOW), "runs/a")
    wrong = "policy stop in the recipe, but the model in runs/a has policy window, first 64, window 64"
    with pytest.raises(MetronomeError, match=wrong):
        check_same(model.config, ContextConfig(), "runs/a")
