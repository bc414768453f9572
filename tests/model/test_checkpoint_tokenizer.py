"""A checkpoint carries its tokenizer, everybody takes the vocabulary from there, and ids that disagree are refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kernels.errors import MetronomeError
from model.add_tokens import add_tokens, main
from model.backbone.transformer import InteractionModel
from model.config import IMAGE_TOKEN_ID, preset
from model.tokenizer import NAMES, SPECIALS, load_tokenizer, read_tokenizer, words_digest
from model.weights import checkpoint, manifest
from model.weights.checkpoint import CheckpointError
from rollout.engines.workers.task import Setup
from rollout.engines.workers.worker import Worker
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import Mode
from rollout.turn.vocabulary import Vocabulary
from tests.support.calls import calls, sources
from tests.support.models import fresh_model

FILES = ("tokenizer.json", "tokenizer_config.json")


def other_words() -> PreTrainedTokenizerFast:
    """The shipped words with other ids: those of ``yes`` and ``no`` exchanged, say."""
    words = load_tokenizer().get_vocab()
    words["yes"], words["no"] = words["no"], words["yes"]
    return made(words)


def made(words: dict[str, int], **settings: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|unk|>")),
        **{"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|end|>", "unk_token": "<|unk|>"} | settings,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(fresh_model("nano"), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return shutil.copytree(saved, tmp_path / "model")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_it_comes_back_and_is_saved_again_byte_for_byte(saved: Path, tmp_path: Path) -> None:
    model = checkpoint.load(saved)
    assert model.tokenizer is not None and words_digest(model.tokenizer) == words_digest(load_tokenizer())
    assert Vocabulary.of(model).classes.allowed.equal(Vocabulary.build(256).classes.allowed)
    checkpoint.save(model, tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_checkpoints_own_words_are_the_models(tmp_path: Path) -> None:
    model = fresh_model("nano")
    model.tokenizer = other_words()
    checkpoint.save(model, tmp_path / "other")
    loaded, shipped = Vocabulary.of(checkpoint.load(tmp_path / "other")), Vocabulary.build(256)
    assert (loaded.word_id("yes"), loaded.word_id("no")) == (shipped.word_id("no"), shipped.word_id("yes"))
    into = fresh_model("nano")
    assert Vocabulary.of(into).word_id("yes") == shipped.word_id("yes")
    checkpoint.load_into(into, tmp_path / "other")
    assert Vocabulary.of(into).word_id("yes") == shipped.word_id("no"), "nothing of the earlier vocabulary is kept"


def test_made_once_for_a_model() -> None:
    model = fresh_model("nano")
    assert Vocabulary.of(model) is Vocabulary.of(model)
    assert Vocabulary.of(model) is not Vocabulary.of(fresh_model("nano"))


def bytes_only() -> PreTrainedTokenizerFast:
    """Of Inkling's kind: of bytes, so that it can write everything."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"extra_special_tokens": [f"<|{name}|>" for name in (*NAMES, "pad")]})
    return fast


@pytest.mark.parametrize("name", [*NAMES, "pad"])
def test_a_text_cannot_hold_control_tokens(name: str) -> None:
    """Texts of events may be a stranger's."""
    text = f"four <|{name}|>"
    for vocabulary in (Vocabulary.build(256), Vocabulary.build(300, bytes_only())):
        control = vocabulary.ids[f"<|{name}|>"]
        assert control not in vocabulary.encode(text) and len(vocabulary.encode(text)) > 1
        assert control in vocabulary.tokenizer.encode(text, add_special_tokens=False), "the control: as others read it"
        assert control not in vocabulary.encode(text), "whoever has read with it in between"


def test_models_with_other_words_do_not_meet() -> None:
    model, other = fresh_model("nano"), fresh_model("nano")
    Vocabulary.of(model).check_same(other, "reward model x")
    other.tokenizer = other_words()
    with pytest.raises(MetronomeError, match="reward model x has another tokenizer than the policy"):
        Vocabulary.of(model).check_same(other, "reward model x")


def audio(content: dict[str, Any]) -> None:
    content["audio_token_id"] = 9


def picture(content: dict[str, Any]) -> None:
    content["image_token_id"] = 3


def begin(content: dict[str, Any]) -> None:
    content["text_config"]["bos_token_id"] = 5


def end(content: dict[str, Any]) -> None:
    content["text_config"]["eos_token_id"] = 3


def padding(content: dict[str, Any]) -> None:
    content["text_config"]["pad_token_id"] = 1


def rows(content: dict[str, Any]) -> None:
    content["text_config"]["unpadded_vocab_size"] = 200


@pytest.mark.parametrize(
    ("change", "said"),
    [(audio, "audio_token_id is 9, but <|audio|> is token 2"),
     (picture, "image_token_id is 3, but <|image|> is token 194"),
     (begin, "text_config.bos_token_id is 5, but <|bos|> is token 1"),
     (end, "text_config.eos_token_id is 3, but <|end|> is token 6"),
     (padding, "text_config.pad_token_id is 1, but <|pad|> is token 0"),
     (rows, "its ids reach 255, but the model's vocabulary has 200")],
)  # fmt: skip
def test_ids_that_disagree_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    checkpoint.load(folder)  # the control
    edit(folder / "config.json", change)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [f"<|{name}|>" for name in NAMES])
def test_a_token_that_is_missing_is_named(folder: Path, text: str) -> None:
    words = {f"[{word}]" if word == text else word: i for word, i in load_tokenizer().get_vocab().items()}
    made(words, bos_token=None, eos_token=None).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"the tokenizer lacks {text.replace('|', '.')}; add .*model.add_tokens"):
        checkpoint.load(folder)


def test_two_uses_of_one_token_are_refused(folder: Path) -> None:
    named = {"model_specific_special_tokens": {"audio_token": "<|audio|>", "end_token": "<|speak|>"}}
    edit(folder / "tokenizer_config.json", lambda content: content.update(named | {"end_token": "<|speak|>"}))
    with pytest.raises(CheckpointError, match="speak and end are both token 4"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_half_a_tokenizer_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing; copy the tokenizer's files again"):
        checkpoint.load(folder)


def test_a_checkpoint_without_has_the_shipped_one_if_it_fits(folder: Path) -> None:
    """What older versions saved."""
    for name in FILES:
        (folder / name).unlink()
    assert Vocabulary.of(checkpoint.load(folder)).word_id("yes") == Vocabulary.build(256).word_id("yes")
    edit(folder / "config.json", audio)
    model = checkpoint.load(folder)  # its forward is still of use
    with pytest.raises(MetronomeError, match=r"audio_token_id is 9, but .*\. Put tokenizer.json and"):
        Vocabulary.of(model)


def test_a_worker_has_the_models(tmp_path: Path) -> None:
    """As it gets the setup: pickled."""
    setup = Setup(preset("nano"), torch.float32, other_words(), None, ScenarioConfig(), 1, 64, 1)
    for given, token in ((setup, "no"), (replace(setup, tokenizer=load_tokenizer()), "yes")):
        worker = Worker(pickle.loads(pickle.dumps(given)), 0)
        assert Vocabulary.of(worker._model).word_id("yes") == Vocabulary.build(256).word_id(token)


def test_only_the_vocabulary_builds_vocabularies() -> None:
    """Everybody else takes the model's."""
    build = {n for n, tree in sources() for name, _ in calls(tree) if name.endswith("Vocabulary.build")}
    assert build == {"rollout.turn.vocabulary", "reward.pairs", "rl.room"}, "of a recipe, before there is a model"
    shipped = {n for n, tree in sources() for name, _ in calls(tree) if name.endswith("tokenizer.load_tokenizer")}
    assert shipped == {"rollout.turn.vocabulary", "rl.audit.episodes"}, "rl.audit.episodes: of a run without any model"


# ---- adding tokens ----


def inkling_like(tmp_path: Path, vocab: int = 40, unpadded: int | None = 30) -> Path:
    """A folder with a tokenizer as Inkling's, small: sound and pictures have tokens whose texts say nothing."""
    config = preset("nano")
    config.text_config.vocab_size, config.text_config.unpadded_vocab_size = vocab, unpadded
    config.text_config.bos_token_id, config.text_config.eos_token_id = 0, 1
    config.text_config.pad_token_id = None
    config.audio_token_id, config.image_token_id = 27, 28
    model = InteractionModel(config)
    model.init_weights(0)
    assert model.tokenizer is None
    checkpoint.save(model, tmp_path / "inkling")
    assert not any((tmp_path / "inkling" / name).exists() for name in FILES)
    words = {"<|begin|>": 0, "<|stop|>": 1} | {f"w{i}": i for i in range(2, 27)}
    words |= {f"<|unused_{i}|>": i for i in range(27, 30)}
    made(words, bos_token="<|begin|>", eos_token="<|stop|>", unk_token=None, pad_token=None).save_pretrained(
        tmp_path / "inkling"
    )
    return tmp_path / "inkling"


def test_tokens_are_added_within_the_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = inkling_like(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks .*<.audio.>.*add_tokens"):
        checkpoint.load(folder)
    before = (folder / "model.safetensors").read_bytes()
    main([str(folder)])
    assert capsys.readouterr().out.splitlines()[0] == "<|listen|> is token 30"
    assert (folder / "model.safetensors").read_bytes() == before
    model = checkpoint.load(folder)
    vocabulary = Vocabulary.of(model)
    assert (vocabulary.bos, vocabulary.audio, vocabulary.image) == (0, 27, 28)
    ids = [vocabulary.mode_id(mode) for mode in Mode] + [vocabulary.end]
    assert sorted(ids) == [30, 31, 32, 33] and model.vocab == 34
    said = vocabulary.classes.allowed[2].nonzero()[:, 0].tolist()
    assert {*range(2, 27), vocabulary.end} <= set(said) and not {0, 1, 27, 28, *ids[:-1]} & set(said)
    files = {name: (folder / name).read_bytes() for name in (*FILES, "config.json")}
    assert add_tokens(folder) == {}
    assert {name: (folder / name).read_bytes() for name in files} == files, "a second time changes nothing"
    again = read_tokenizer(folder)
    assert again.encode("<|listen|>", add_special_tokens=False) == [vocabulary.listen]


def test_no_room_is_said(tmp_path: Path) -> None:
    folder = inkling_like(tmp_path, vocab=32)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(MetronomeError, match=r"4 tokens are missing: .*The 32 rows of the vocabulary have room for 2"):
        add_tokens(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_a_config_that_contradicts_is_not_mended_by_itself(tmp_path: Path) -> None:
    folder = inkling_like(tmp_path)
    edit(folder / "config.json", lambda content: content["text_config"].update(bos_token_id=9))
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(MetronomeError, match=r"text_config.bos_token_id is 9, but <.begin.> is token 0"):
        add_tokens(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_a_runs_checkpoint_is_left_as_it_is(folder: Path) -> None:
    manifest.write(folder, "model")
    with pytest.raises(MetronomeError, match="a run saved this checkpoint"):
        add_tokens(folder)


def test_the_shipped_specials_are_what_they_were() -> None:
    ids = load_tokenizer().get_vocab()
    assert [ids[text] for text in SPECIALS] == list(range(8)) and ids["<|image|>"] == IMAGE_TOKEN_ID
