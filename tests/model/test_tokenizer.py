"""The word tokenizer and the classes of sampled tokens."""

from __future__ import annotations

import pytest
import torch

from model import tokenizer as words
from model.config import IMAGE_TOKEN_ID
from model.logprob import FIRST_TEXT, MODE, NEXT_TEXT, TokenClasses
from model.tokenizer import SPECIALS, load_tokenizer

TOKENIZER = load_tokenizer()


def test_ids() -> None:
    assert len(TOKENIZER) == 256
    assert tuple(TOKENIZER.convert_ids_to_tokens(range(8))) == SPECIALS
    assert TOKENIZER.convert_tokens_to_ids("<|listen|>") == words.LISTEN
    assert TOKENIZER.convert_tokens_to_ids("<|end|>") == words.END == TOKENIZER.eos_token_id
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.unk_token_id) == (words.PAD, words.BOS, words.UNK)


def test_every_word_comes_back() -> None:
    vocabulary = TOKENIZER.convert_ids_to_tokens(range(8, 256))
    ids = TOKENIZER(" ".join(vocabulary)).input_ids
    assert ids == list(range(8, 256))
    assert TOKENIZER.decode(ids) == " ".join(vocabulary)


@pytest.mark.parametrize("text", ["breathe", "twenty", "one moment please", "thank you", "here is the answer"])
def test_task_phrases_are_known(text: str) -> None:
    assert words.UNK not in TOKENIZER(text).input_ids
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_case_punctuation_specials_and_unknown_words() -> None:
    ids = TOKENIZER("Breathe, FOUR!  <|speak|>xylophone I'm").input_ids
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["breathe", "four", "<|speak|>", "<|unk|>", "i'm"]


def test_classes() -> None:
    allowed = TokenClasses.build(TOKENIZER, 256).allowed
    sayable = [i for i in range(8, 256) if i != IMAGE_TOKEN_ID]
    assert TOKENIZER.convert_ids_to_tokens(IMAGE_TOKEN_ID) == "<|image|>"
    assert allowed[MODE].nonzero()[:, 0].tolist() == [words.LISTEN, words.SPEAK]
    assert allowed[FIRST_TEXT].nonzero()[:, 0].tolist() == sayable
    assert allowed[NEXT_TEXT].nonzero()[:, 0].tolist() == [words.END, *sayable]
    with_delegate = TokenClasses.build(TOKENIZER, 300, delegate=True).allowed
    assert with_delegate[MODE].nonzero()[:, 0].tolist() == [words.LISTEN, words.SPEAK, words.DELEGATE]
    assert not with_delegate[:, 256:].any()
    with pytest.raises(ValueError, match="256 tokens, the model's vocabulary only 100"):
        TokenClasses.build(TOKENIZER, 100)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampler_and_learner_share_one_log_probability(backend: str, temperature: float) -> None:
    classes = TokenClasses.build(TOKENIZER, 256)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 256, generator=generator) * 3
    row_class = torch.randint(0, 3, (64,), generator=generator)
    token, logp, digest = classes.sample(logits, torch.arange(64) * 7919, row_class, temperature)
    assert classes.allowed[row_class, token].all()
    for rows in (slice(0, 64), slice(5, 6)):
        again, entropy, other = classes.logprob(logits[rows], token[rows], row_class[rows], temperature)
        assert torch.equal(again, logp[rows]) and torch.equal(other, digest[rows])
        assert (entropy >= 0).all()
    masked = logits.masked_fill(~classes.allowed[row_class], -torch.inf) / (temperature or 1)
    expected = masked.log_softmax(1).gather(1, token[:, None])[:, 0]
    assert torch.allclose(logp, expected, atol=1e-5)
    changed = logits.clone()
    changed[3, 200] = torch.nextafter(changed[3, 200], torch.tensor(torch.inf)) + 1e-3
    row_class[3] = FIRST_TEXT
    before, after = (
        classes.logprob(x, token.clamp(min=8), row_class.fill_(FIRST_TEXT), 1.0)[2] for x in (logits, changed)
    )
    assert (before != after).nonzero()[:, 0].tolist() == [3], "negative control: a digest must see another row"


def test_a_forbidden_token_is_an_error(backend: str) -> None:
    classes = TokenClasses.build(TOKENIZER, 256)
    with pytest.raises(ValueError, match="token"):
        classes.logprob(torch.zeros(1, 256), torch.tensor([words.PAD]), torch.tensor([MODE]), 1.0)
