"""The recogniser understands the shipped words and what Griffin-Lim makes of them; without its package it says so."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from model.voice.sound import render
from reward.voice.recognise import Recogniser, RecogniserError
from reward.voice.table import SPOKEN, main, recordings, streamed
from rollout.world.lexicon import Lexicon, lexicon

FEW = ("three", "four", "seven", "yes", "right", "hello", "goodbye", "answer")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(RecogniserError, match=r"not installed: `pip install -e '.\[voice\]'`") as error:
        Recogniser(FEW)
    assert "\n" not in str(error.value)
    with pytest.raises(RecogniserError, match="not installed"):
        main(["--words", "four"])


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    pytest.importorskip("pocketsphinx", reason="the extra `voice` is not installed")
    return Recogniser(FEW)


def test_words_are_understood(recogniser: Recogniser) -> None:
    """From the recording, rendered whole and streamed; the control: another word's sound is not taken for it."""
    lexicon, spoken = Lexicon.open(), recordings()
    for make in (spoken.__getitem__, lambda w: render(lexicon.target(w)), lambda w: streamed(lexicon.target(w))):
        heard = [recogniser.word(make(word)) for word in FEW]
        assert len([1 for word, said in zip(FEW, heard, strict=True) if word == said]) >= 7, heard
        shifted = zip(FEW[1:] + FEW[:1], heard, strict=True)
        assert len([1 for word, said in shifted if word == said]) <= 1


def test_an_answer_does_not_depend_on_what_was_heard_before(recogniser: Recogniser) -> None:
    spoken = recordings()
    alone = {word: Recogniser(FEW).word(spoken[word] * 0.1) for word in FEW[:2]}
    recogniser.word(torch.rand(16000) * 2 - 1)
    assert {word: recogniser.word(spoken[word] * 0.1) for word in FEW[:2]} == alone


def test_nor_on_the_order_of_what_is_asked(monkeypatch: pytest.MonkeyPatch, recogniser: Recogniser) -> None:
    """Beginnings of words, forwards and backwards; without a new front end for each, some answers differ (control)."""
    beginnings = [render(lexicon().target(word)[:1], 16) for word in lexicon().words]

    def turned(ear: Recogniser) -> int:
        """How many answers the order changes."""
        forwards = [ear.word(sound) for sound in beginnings]
        backwards = [ear.word(sound) for sound in reversed(beginnings)]
        return sum(a != b for a, b in zip(forwards, reversed(backwards), strict=True))

    assert turned(recogniser) == 0
    kept = Recogniser(FEW)
    monkeypatch.setattr(kept, "_decoder", KeepsItsFrontEnd(kept._decoder))
    assert turned(kept) > 0


class KeepsItsFrontEnd:
    """A decoder as it is, but for beginning anew."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def reinit_feat(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def test_free_decoding(recogniser: Recogniser) -> None:
    assert recogniser.free(recordings()["hello"]) == ("hello",)
    assert recogniser.word(recordings()["hello"]) == "hello"  # the grammar is back


def test_silence_says_nothing(recogniser: Recogniser) -> None:
    assert recogniser.word(torch.zeros(16000)) is None and recogniser.word(torch.zeros(0)) is None


def test_what_it_cannot_hear(recogniser: Recogniser) -> None:
    for sound in (torch.full((3200,), float("nan")), torch.zeros(2, 3200)):
        with pytest.raises(RecogniserError, match="got a sound"):
            recogniser.word(sound)
    for words, says in ((("four", "xqzzt"), "no pronunciation of 'xqzzt'"), (("a;b",), "'a;b'"), ((), "no word")):
        with pytest.raises(RecogniserError, match=says):
            Recogniser(words)


def test_the_table(recogniser: Recogniser, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--words", "four,hello", "--iterations", "8"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:]] == ["recording", "whole", "streamed"] and set(FEW) <= set(SPOKEN)
    assert said[1].split()[1] == "2" and float(said[1].split()[3]) == 0
