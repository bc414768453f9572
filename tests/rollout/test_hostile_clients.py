"""One client's input never ends or changes another's session: whatever it sends as sound, key, temperature or number is
heard or refused, by the check that the engine makes itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import MetronomeError
from model.backbone.state import ContextFull
from rollout.engines.service import Client, OutOfOrder, Refused, Service
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.grammar import context_rows
from rollout.turn.observation import MissingSenseError, Observation
from tests.support.services import MAX_CHUNKS, record
from tests.support.sessions import sound


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (replace(sound(0), audio=torch.full((CHUNK_SAMPLES,), torch.nan)), "not finite"),
        (replace(sound(0), audio=sound(0).audio / 0), "not finite"),
        (replace(sound(0), events=("hello",)), "room for 0"),
        (replace(sound(0), frames=torch.zeros(1, 8, 8, 3, dtype=torch.uint8)), "no video"),
        (Observation(torch.full((CHUNK_SAMPLES,), 2.4e16)), "size 2.4e\\+16; full scale is 1"),
        (Observation(torch.full((CHUNK_SAMPLES,), -32768.0)), "size 32768; full scale is 1"),
        (Observation(torch.zeros(CHUNK_SAMPLES, requires_grad=True)), "without a gradient"),
        (Observation(torch.zeros(CHUNK_SAMPLES, device="meta")), "on the CPU"),
        (Observation(torch.nn.Parameter(torch.zeros(CHUNK_SAMPLES), requires_grad=False)), "this Parameter"),
        (torch.zeros(CHUNK_SAMPLES), "hears observations of 200 ms, not torch.float32"),
        (None, "not NoneType"),
    ],
)
def test_what_cannot_be_heard_concerns_its_own_client(
    make: Callable[..., Service], chunk: Observation, says: str
) -> None:
    service = make()
    client, other = service.open(1), service.open(2)
    with pytest.raises((ValueError, MissingSenseError), match=says):
        service.offer(client, 0, chunk)
    service.offer(client, 0, sound(0))
    assert list(service.tick()) == [client, other]


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "3", None, float("nan")])
@pytest.mark.parametrize("name", ["max_chunks", "idle_chunks"])
def test_limits_must_be_numbers_that_limit(make: Callable[..., Service], name: str, wrong: Any) -> None:
    limits: dict[str, Any] = {"max_chunks": 1, "idle_chunks": 1}
    engine = make().engine
    Service(engine, **limits)
    with pytest.raises(ValueError, match=f"{name} is .* at least 1"):
        Service(engine, **limits | {name: wrong})


def test_sessions_longer_than_the_engine_has_room_for_are_refused(make: Callable[..., Service]) -> None:
    engine = make().engine
    assert engine.max_chunks == MAX_CHUNKS
    Service(engine, max_chunks=MAX_CHUNKS)
    with pytest.raises(ValueError, match=f"max_chunks is {MAX_CHUNKS + 1}, .* has room for {MAX_CHUNKS}"):
        Service(engine, max_chunks=MAX_CHUNKS + 1)


class Odd:
    """Whatever a client may send as a key, a temperature or a chunk's number."""

    WHOLE = (
        True,
        False,
        None,
        "1",
        b"1",
        1.0,
        float("nan"),
        1j,
        np.int64(1),
        np.uint64(1),
        torch.tensor(1),
        [1],
        (),
        {},
    )
    KEYS = (*WHOLE, -1, 2**64, -(10**5000), 10**5000)
    NUMBERS = (*WHOLE, 2**63, 10**5000)
    TEMPERATURES = (*WHOLE[:5], *WHOLE[6:], np.float64(1), -0.1, 1e-7, 1e7, float("inf"), 10**400, 1e-320)


def test_what_is_no_key_or_temperature_opens_nothing(make: Callable[..., Service]) -> None:
    service = make()
    other = service.open(2**64 - 1, 1e-6)
    for key in Odd.KEYS:
        with pytest.raises(ValueError, match="key is a whole number"):
            service.open(key)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="key is a whole number"):
            service.engine.fork(other.session, key)  # type: ignore[arg-type]
    for temperature in Odd.TEMPERATURES:
        with pytest.raises(ValueError, match="temperature is"):
            service.open(1, temperature)  # type: ignore[arg-type]
    assert service.engine.free == 2 and service.clients == [other]
    hottest = service.open(0, 1e6)  # the control
    assert list(service.tick()) == [other, hottest]
    assert all(bool(torch.tensor(client.session.logprob).isfinite().all()) for client in (other, hottest))


def test_what_is_no_number_of_a_chunk_is_refused(make: Callable[..., Service]) -> None:
    service = make()
    client = service.open(1)
    for number in Odd.NUMBERS:
        with pytest.raises(ValueError, match="number is a whole number"):
            service.offer(client, number, sound(0))  # type: ignore[arg-type]
    for number in (-1, 1, 2**63 - 1, -(2**63) + 1):
        with pytest.raises(OutOfOrder):
            service.offer(client, number, sound(0))
    service.offer(client, 0, sound(0))  # the control
    assert list(service.tick()) == [client] and not client.missed


def test_another_services_client_is_refused(make: Callable[..., Service]) -> None:
    service, other = make(), make()
    client, stranger = service.open(1), other.open(1)
    for wrong in (stranger, Client(client.session), client.session, None, torch.zeros(2)):
        for use in (lambda one: service.offer(one, 0, sound(0)), service.close):
            with pytest.raises(Refused, match="no such client"):
                use(wrong)
    assert not client.ended and not stranger.ended
    service.offer(client, 0, sound(0))
    other.offer(stranger, 0, sound(0))  # the control: each where it was opened
    service.close(client)
    other.close(stranger)


def test_a_session_that_cannot_go_on_ends_alone(make: Callable[..., Service]) -> None:
    """One whose context is full, although the service's limit is not reached, and one that was closed behind its
    back."""
    service = make()
    full, closed, other = (service.open(key) for key in range(3))
    service.tick()
    full.session.computed = context_rows(MAX_CHUNKS, 1) - 1
    service.engine.close(closed.session)
    with pytest.raises(ContextFull):
        service.offer(full, 1, sound(1))
    service.offer(other, 1, sound(1))
    assert list(service.tick()) == [other] and not other.ended
    assert "another micro-turn may need" in full.ended and "closed" in closed.ended
    assert service.engine.free == 2 and full.session.closed


def test_all_are_told_when_the_engine_can_close_none(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    clients = [service.open(k) for k in range(3)]
    monkeypatch.setattr(service.engine, "append", lambda *_: 1 / 0)
    monkeypatch.setattr(service.engine, "close", lambda *_: [][0])
    with pytest.raises(IndexError):
        service.tick()
    assert all("ZeroDivisionError" in client.ended for client in clients)


def test_a_weaker_check_would_end_them_all(make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the check is for."""
    service = make()
    other, wild = service.open(1), service.open(2)
    monkeypatch.setattr(service.engine, "check", lambda *_: None)
    service.offer(wild, 0, Observation(torch.full((CHUNK_SAMPLES,), torch.nan)))
    with pytest.raises(ValueError, match="NaN"):
        service.tick()
    assert other.ended and wild.ended


SAMPLES = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-100, 100, width=32),
    st.floats(width=32),
    st.sampled_from([100.0, -100.0, 100.00001, 1e16, 2.4e16, 3.4e38, float("inf"), float("nan"), 1e-45, -0.0]),
)
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x,
    "strided": lambda x: x.repeat_interleave(2)[::2],
    "expanded": lambda x: x[:1].expand(CHUNK_SAMPLES),
    "negative view": lambda x: torch.complex(x, -x).conj().imag,
    "gradient": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "fp64": lambda x: x.double(),
    "fp16": lambda x: x.half(),
    "int32": lambda x: x.nan_to_num().int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.cfloat(),
    "short": lambda x: x[1:],
    "empty": lambda x: x[:0],
    "two channels": lambda x: x.view(2, -1),
    "batch": lambda x: x[None],
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "nothing": lambda x: None,
}


FORM = st.sampled_from(["plain", "strided", "expanded"]) | st.sampled_from(sorted(FORMS))


class Crowd:
    """A client that sends anything, between two that send sound."""

    def __init__(self, service: Service) -> None:
        self.service, self.k = service, 0
        self.quiet = (service.open(1), service.open(2))
        self.wild: Client | None = None

    def tick(self, wild: Any = None) -> bool:
        """One tick; whether the wild client's chunk was taken."""
        taken = False
        for n, client in enumerate(self.quiet):
            self.service.offer(client, self.k, sound(100 * n + self.k))
        if wild is not None:
            if self.wild is None or self.wild.ended:
                self.wild = self.service.open(3)
            due = self.wild.session.chunks
            try:
                self.service.engine.check(self.wild.session, wild)
                taken = True
            except (ValueError, MetronomeError):
                with pytest.raises((ValueError, MetronomeError)):
                    self.service.engine.append([self.wild.session], [wild])  # what it refuses, …
                with pytest.raises((ValueError, MetronomeError)):
                    self.service.offer(self.wild, due, wild)  # … the service refuses
            else:
                self.service.offer(self.wild, due, wild)
        self.service.tick()
        self.k += 1
        return taken


def test_whatever_is_offered_changes_no_other_client(make: Callable[..., Service]) -> None:
    taken = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(
            st.tuples(FORM, st.lists(SAMPLES, min_size=1, max_size=3), st.sampled_from([False, False, False, True])),
            min_size=3,
            max_size=3,
        )
    )
    def offer(chunks: list[tuple[str, list[float], bool]]) -> None:
        crowd, alone = Crowd(make()), Crowd(make())
        for form, samples, typed in chunks:
            audio = FORMS[form](torch.tensor(samples).repeat(CHUNK_SAMPLES)[:CHUNK_SAMPLES])
            try:
                chunk: Any = Observation(audio, events=("hello",) * typed)
            except ValueError:
                chunk = Observation(torch.zeros(CHUNK_SAMPLES))
                object.__setattr__(chunk, "audio", audio)  # as if it had been changed after it was made
            taken.append(crowd.tick(chunk))
            alone.tick()
        for one, other in zip(crowd.quiet, alone.quiet, strict=True):
            assert not one.ended and record(one) == record(other)
            assert torch.equal(one.session.codes, other.session.codes)
        assert record(crowd.quiet[0]) != record(crowd.quiet[1])  # the control: records can differ

    offer()
    assert 10 < sum(taken) < len(taken) - 10, "both answers were given"
