"""The Fourier transform against numpy's, and dMel's native code against its definition, bit for bit."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import dispatch, dmel, fourier
from kernels.cpu.dmel import transform
from kernels.reference import dmel as reference_dmel
from model.senses.audio import HOP, WINDOW, DMel
from tests.kernels.contract import generator, threads


def sound(sessions: int, frames: int, seed: int = 0) -> Tensor:
    """Noise from far below the lowest edge to far above full scale, a session silent, fp32."""
    level = torch.logspace(-9, 2, sessions)[:, None]
    samples = torch.randn(sessions, WINDOW + (frames - 1) * HOP, generator=generator(seed)) * level
    samples[sessions // 2] = 0
    return samples


@pytest.mark.parametrize("radices", [(2,), (4,), (5,), (5, 4), (4, 5, 2), reference_dmel.RADICES])
def test_transforms_agree_with_numpys(radices: tuple[int, ...]) -> None:
    half = int(np.prod(radices))
    rng = np.random.default_rng(half)
    roots = fourier.long_roots(2, half)
    re, im = rng.standard_normal((2, half, 3))
    got = fourier.fft((re, im), radices, roots[::2])
    wanted = np.fft.fft(re + 1j * im, axis=0)
    bound = {"rtol": 0, "atol": 1e-14 * half}
    np.testing.assert_allclose(got[0] + 1j * got[1], wanted, **bound)
    x = rng.standard_normal((2 * half, 3))
    got = fourier.real_fft(x, radices, roots)
    np.testing.assert_allclose(got[0] + 1j * got[1], np.fft.rfft(x, axis=0)[1:-1], **bound)
    spectrum = rng.standard_normal((2, half - 1))
    whole = np.concatenate(([0], spectrum[0] + 1j * spectrum[1], [0]))
    back = fourier.real_inverse((spectrum[0], spectrum[1]), radices, roots)
    np.testing.assert_allclose(back / half, np.fft.irfft(whole), **bound)


def test_a_column_does_not_depend_on_its_neighbours() -> None:
    x, roots = np.random.default_rng(0).standard_normal((WINDOW, 9)), DMel.build().roots.numpy()
    together = fourier.real_fft(x, reference_dmel.RADICES, roots)
    for i in range(9):
        alone = fourier.real_fft(x[:, i : i + 1].copy(), reference_dmel.RADICES, roots)
        assert all(np.array_equal(a[:, 0], t[:, i]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize(("sessions", "frames"), [(1, 1), (1, 4), (3, 4), (5, 7), (2, 33), (24, 4)])
def test_native_code_gives_the_definitions_bits(sessions: int, frames: int) -> None:
    """Mel values as well as codes; every remainder of a block of frames."""
    samples, tables = sound(sessions, frames), DMel.build()
    codes, mel = transform(samples, HOP, tables)
    assert codes.dtype == torch.uint8 and codes.shape == mel.shape == (sessions, frames, 80)
    defined = reference_dmel.transform(samples, HOP, tables)
    assert torch.equal(codes, defined[0]) and torch.equal(mel, defined[1])
    assert sessions < 24 or codes.unique().tolist() == list(range(2, 16))  # the floor keeps silence in bin 2


def test_control_another_order_of_summation_has_other_bits() -> None:
    """Each filter's bins in descending order: the mel values differ in their last places, and the check sees it."""
    samples, tables = sound(5, 7), DMel.build()
    _, mel = transform(samples, HOP, tables)
    backwards = tables.weight.flip(1)
    frames = samples.unfold(1, WINDOW, HOP).reshape(-1, WINDOW).T.double().numpy()
    re, im = fourier.real_fft(frames * tables.window.numpy()[:, None], reference_dmel.RADICES, tables.roots.numpy())
    magnitude = np.pad(np.sqrt(np.maximum(re * re + im * im, reference_dmel.FLOOR)), ((0, 59), (0, 0)))
    last = tables.first.numpy() - 1 + backwards.shape[1] - 1
    other = np.zeros((80, magnitude.shape[1]))
    for j in range(backwards.shape[1]):
        other = other + backwards.numpy()[:, j : j + 1] * magnitude[last - j]
    other = torch.from_numpy(other.T).view(mel.shape)
    assert not torch.equal(other, mel)
    torch.testing.assert_close(other, mel, rtol=1e-14, atol=0)


def test_threads_do_not_matter() -> None:
    samples, tables = sound(40, 40), DMel.build()
    with threads(1):
        one = transform(samples, HOP, tables)
    with threads(2):
        two = transform(samples, HOP, tables)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_no_frame_is_no_code() -> None:
    assert dmel.codes(torch.empty(0, WINDOW), HOP, DMel.build())[0].shape == (0, 1, 80)


def test_a_changed_table_is_seen() -> None:
    """Control: one weight, one root and one window value each, changed by a billionth, change mel values."""
    samples, tables = sound(5, 7), DMel.build()
    _, mel = transform(samples, HOP, tables)
    for name, place in (("weight", (30, 2)), ("roots", (3, 0)), ("window", 700)):
        table = getattr(tables, name).clone()
        table[place] *= 1 + 1e-9
        changed = replace(tables, **{name: table})
        assert not torch.equal(transform(samples, HOP, changed)[1], mel), name
        assert torch.equal(transform(samples, HOP, changed)[1], reference_dmel.transform(samples, HOP, changed)[1])


def test_without_a_native_library_the_definition_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host that is no x86-64, under a backend that does not need the library."""

    def missing(name: str, arguments: str) -> None:
        raise RuntimeError("no library")

    monkeypatch.delitem(sys.modules, "kernels.cpu.dmel")
    monkeypatch.setattr("kernels.cpu.library.bind", missing)
    dmel._native.cache_clear()
    assert dmel._native() is reference_dmel.transform
    monkeypatch.undo()
    dmel._native.cache_clear()
    assert dispatch.backend().NAME != "cpu" or dmel._native() is not reference_dmel.transform
