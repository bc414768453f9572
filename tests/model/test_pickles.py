"""Only safetensors are read: pickles are refused with why and what to do, and nothing in them is executed."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.errors import MetronomeError
from model.program.reading import UnreadableError
from model.weights import checkpoint, tensors
from model.weights.checkpoint import CheckpointError
from model.weights.pickles import CONVERT
from tests.model.damage import Payload
from tests.support.models import fresh_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(fresh_model("nano"), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "w.pt", "w.pth", "w.ckpt"])
def test_a_folder_of_pickles_is_refused(folder: Path, name: str, tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "trace")}, folder / name)
    checkpoint.load(folder)  # the control: beside safetensors they are not looked at
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    said = str(error.value)
    assert "\n" not in said and f"no safetensors but {name}, and loading a pickle executes what is in it" in said
    assert CONVERT in said
    (folder / "other.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no safetensors but \S+ and 1 more"):
        checkpoint.config_of(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="loading a pickle"):
        checkpoint.load(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", ["zip", "old torch", *map(str, range(2, 6))])
def test_a_pickle_by_another_name_is_refused(folder: Path, kind: str, tmp_path: Path) -> None:
    payload, weights = Payload(tmp_path / "trace"), folder / WEIGHTS
    if kind.isdigit():
        weights.write_bytes(pickle.dumps(payload, protocol=int(kind)))
    else:
        torch.save({"x": payload}, weights, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a .*loading it could execute what is in it") as e:
        checkpoint.load(folder)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "trace").exists()


def test_a_safetensors_file_may_begin_like_a_pickle(tmp_path: Path) -> None:
    """Its first bytes are a length: 0x280 here, which a pickle of the second protocol begins with, too."""
    one = tmp_path / "one.safetensors"
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280)
    one.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert one.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(tensors.read_tensors(one)["x"], torch.zeros(1))
    one.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(UnreadableError, match="is a pickle, and no safetensors"):
        tensors.read_tensors(one)


def test_the_command_that_is_named_converts(folder: Path) -> None:
    digest = checkpoint.weights_digest(checkpoint.load(folder))
    torch.save(tensors.read_tensors(folder / WEIGHTS), folder / "pytorch_model.bin")
    shutil.move(folder / WEIGHTS, folder.parent)
    with pytest.raises(MetronomeError, match="loading a pickle"):
        checkpoint.load(folder)
    subprocess.run([sys.executable, "-c", CONVERT], cwd=folder, check=True, timeout=120)
    assert checkpoint.weights_digest(checkpoint.load(folder)) == digest
