"""The promise at model level: prefill, chunks, single tokens, forks, company and the learner's forward give one result,
bit for bit, on every hidden row."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import dispatch
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from tests.kernels.contract import uneven
from tests.model.cases import ROWS, in_pieces, random_rows, twins, whole

DTYPES = [torch.float32, torch.bfloat16]


def fresh_state(model: InteractionModel, slots: int = 3) -> SessionState:
    return SessionState(model.config, slots, 256, model.dtype, max_rows=512)


def chunks(seed: int) -> list[int]:
    """Random lengths that sum to ROWS."""
    choose, lengths = random.Random(seed), []
    while (left := ROWS - sum(lengths)) > 0:
        lengths.append(min(left, choose.choice([1, 2, 4, 5, 40])))
    return lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_one_function(dtype: torch.dtype, seed: int) -> None:
    assert_one_function(seed, dtype)


@pytest.mark.slow
def test_one_function_on_each_backend(backend: str) -> None:
    assert_one_function(0, torch.float32)


def assert_one_function(seed: int, dtype: torch.dtype) -> None:
    model, _ = twins(seed, dtype)
    rows = random_rows(seed)
    learner = whole(model, rows)
    assert learner.requires_grad
    state = fresh_state(model)
    for lengths in ([ROWS], [64, ROWS - 64], chunks(seed), [1] * ROWS):
        slot = state.open()
        assert torch.equal(in_pieces(model, rows, lengths, state, slot), learner), lengths
        state.close(slot)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 130])
def test_forks_equal_separate_sessions(cut: int) -> None:
    model, _ = twins(2)
    rows, other = random_rows(2), random_rows(3)
    state = fresh_state(model)
    origin = state.open()
    head = rows.cut(0, cut)
    in_pieces(model, head, [cut], state, origin)
    twin = state.fork(origin)
    # The fork first runs along another future, which must leave the origin's alone.
    in_pieces(model, other.cut(cut, ROWS), [ROWS - cut], state, twin)
    second = state.fork(origin) if cut % 2 else origin
    tail = in_pieces(model, rows.cut(cut, ROWS), [1] * (ROWS - cut), state, second)
    assert torch.equal(tail, whole(model, rows)[cut:])


@torch.no_grad()
def test_company_changes_nothing() -> None:
    """Three sessions at different positions in one call, joined in another order each time."""
    model, _ = twins(1)
    state = fresh_state(model)
    slots = [state.open() for _ in range(3)]
    rows = [random_rows(seed) for seed in range(3)]
    at, outputs, choose = [0, 0, 0], [[], [], []], random.Random(0)
    while any(a < ROWS for a in at):
        members = [i for i in range(3) if at[i] < ROWS and choose.random() < 0.8]
        choose.shuffle(members)
        lengths = [min(choose.choice([1, 3, 5, 30]), ROWS - at[i]) for i in members]
        if not members:
            continue
        spans = [(i, at[i], at[i] + n) for i, n in zip(members, lengths, strict=True)]
        segments = state.extend([slots[i] for i in members], lengths)
        hidden = model(Inputs.cat(rows, model.senses).part(spans, segments), state)
        for i, n, part in zip(members, lengths, hidden.split(lengths), strict=True):
            outputs[i].append(part)
            at[i] += n
    for i in range(3):
        assert torch.equal(torch.cat(outputs[i]), whole(model, rows[i]))


@torch.no_grad()
def test_logits_do_not_depend_on_how_many_are_asked_for() -> None:
    model, _ = twins(1)
    hidden = whole(model, random_rows(1))
    every = model.logits(hidden)
    for r in (0, 77, ROWS - 1):
        assert torch.equal(model.logits(hidden[r : r + 1])[0], every[r])


def test_one_ulp_of_one_weight_shows() -> None:
    """Negative control: the comparison sees the smallest change a weight can have."""
    model, _ = twins(0)
    rows = random_rows(0)
    before = whole(model, rows)
    with torch.no_grad():
        weight = model.model.language_model.layers[0].self_attn.v_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    model.repack()
    assert not torch.equal(whole(model, rows), before)


def test_a_product_by_row_count_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a linear whose bits follow the number of rows, single tokens no longer equal the whole."""
    model, _ = twins(0)
    rows = random_rows(0)
    monkeypatch.setattr(dispatch.backend(), "linear", uneven(dispatch.backend().linear))
    state = fresh_state(model)
    assert not torch.equal(in_pieces(model, rows, [1] * ROWS, state, state.open()), whole(model, rows))


@torch.no_grad()
def test_capture_names_every_sub_block_and_changes_nothing() -> None:
    model, _ = twins(0)
    rows = random_rows(0)
    captured: list[tuple[str, torch.Tensor]] = []
    assert torch.equal(whole(model, rows, captured), whole(model, rows))
    names = [name for name, _ in captured]
    assert names[:4] == ["embed", "layers.0.self_attn", "layers.0.mlp", "layers.0"]
    assert len(names) == 1 + 3 * model.config.text_config.num_hidden_layers
    assert all(tensor.shape[0] == ROWS for _, tensor in captured)
