"""A checkpoint of ours in a process where nothing of ours can be imported: transformers' auto classes load it whole,
its tokenizer included, and compute what we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import AUDIO_TOKEN_ID, IMAGE_TOKEN_ID
from model.tokenizer import load_tokenizer
from model.weights import checkpoint
from tests.model.cases import Rows, whole
from tests.model.test_oracle import BOUND, relative_error
from tests.support.models import fresh_model

SENTENCE = "four seconds <|audio|> thank you <|image|>"
CHILD = f"""
import json, sys

OURS = ("kernels", "model", "rollout", "reward", "rl")

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OURS else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
folder, rows, out = sys.argv[1:]
for name in OURS:
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError(name)

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoTokenizer

torch.set_num_threads(1)
said = {{"config": type(AutoConfig.from_pretrained(folder)).__name__}}
tokenizer = AutoTokenizer.from_pretrained(folder)
said["ids"] = tokenizer({SENTENCE!r}).input_ids
said["text"] = tokenizer.decode(said["ids"])
said["named"] = [tokenizer.audio_token, tokenizer.image_token, tokenizer.bos_token, tokenizer.eos_token]
rows = load_file(rows)
for auto in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModel):
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    said[auto.__name__] = [type(model).__name__, {{name: sorted(map(str, keys)) for name, keys in info.items()}}]
    if auto is AutoModelForMultimodalLM:
        with torch.no_grad():
            logits = model(input_ids=rows["tokens"][None], audio_input_ids=rows["codes"][None].long()).logits[0]
        save_file({{"logits": logits.contiguous()}}, out)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """(what the child said, its logits, ours)."""
    folder = tmp_path_factory.mktemp("alone")
    model = fresh_model("tiny")
    checkpoint.save(model, folder / "model")
    tokens = torch.randint(8, 190, (60,), generator=torch.Generator().manual_seed(0))
    tokens[::3] = AUDIO_TOKEN_ID
    codes = torch.randint(0, 16, (20, 80), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    save_file({"tokens": tokens, "codes": codes}, folder / "rows.safetensors")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    paths = [str(folder / name) for name in ("model", "rows.safetensors", "out.safetensors")]
    command = [sys.executable, "-P", "-c", CHILD, *paths]
    child = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    with torch.no_grad():
        ours = model.logits(whole(model, Rows(tokens, codes)))
    return json.loads(child.stdout.splitlines()[-1]), load_file(paths[2])["logits"], ours


def test_every_weight_is_where_transformers_looks(loaded: tuple[dict[str, Any], torch.Tensor, torch.Tensor]) -> None:
    said = loaded[0]
    assert said["config"] == "InklingConfig"
    whole = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    for auto in ("AutoModelForMultimodalLM", "AutoModelForImageTextToText"):
        name, info = said[auto]
        assert name == "InklingForConditionalGeneration" and info | whole == info, auto
    name, info = said["AutoModel"]  # which has no head
    assert name == "InklingModel" and info["missing_keys"] == [] and info["unexpected_keys"] == ["lm_head.weight"]


def test_it_computes_what_we_do(loaded: tuple[dict[str, Any], torch.Tensor, torch.Tensor]) -> None:
    _, theirs, ours = loaded
    assert theirs.shape == ours.shape and relative_error(ours, theirs) <= BOUND
    assert relative_error(ours.roll(1, 0), theirs) > BOUND, "the control: other rows"


def test_its_tokenizer_is_ours(loaded: tuple[dict[str, Any], torch.Tensor, torch.Tensor]) -> None:
    said, tokenizer = loaded[0], load_tokenizer()
    assert said["ids"] == tokenizer(SENTENCE).input_ids and {AUDIO_TOKEN_ID, IMAGE_TOKEN_ID} < set(said["ids"])
    assert said["text"] == SENTENCE and said["named"] == ["<|audio|>", "<|image|>", "<|bos|>", "<|end|>"]
