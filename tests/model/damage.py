"""What happens to checkpoints on disks and in hands: each as a function of the checkpoint's folder, step_000004, and
what must then be said. It has progress.json, model/ and learner/optimizer.safetensors; step_000002 lies beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.weights import manifest

OPTIMIZER = "learner/optimizer.safetensors"


class Payload:
    """What executes when it is unpickled: a harmless stand-in for worse."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return exec, (f"open({self.trace!r}, 'w').write('executed')",)


def flip_bit(file: Path, byte: int | None = None, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if byte is None else byte] ^= 1 << bit
    file.write_bytes(data)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """As a forger would: the manifest's own digest is made anew."""
    content = change(json.loads((folder / manifest.MANIFEST).read_text()))
    content["digest"] = manifest._own_digest(content)
    (folder / manifest.MANIFEST).write_text(json.dumps(content))


def truncated(folder: Path) -> None:
    os.truncate(folder / OPTIMIZER, 50)


def empty(folder: Path) -> None:
    (folder / OPTIMIZER).write_bytes(b"")


def step_changed(folder: Path) -> None:
    file = folder / "progress.json"
    changed = file.read_text().replace('"step": 4', '"step": 1')
    assert changed != file.read_text()
    file.write_text(changed)


def pickle_in_place(folder: Path) -> None:
    torch.save({"extra": Payload(folder.parent / "EXECUTED")}, folder / OPTIMIZER)


def pickle_beside(folder: Path) -> None:
    torch.save({"extra": Payload(folder.parent / "EXECUTED")}, folder / "learner" / "optim_states.pt")


def swapped(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_000002"), folder)


def swapped_file(folder: Path) -> None:
    shutil.copy(folder.with_name("step_000002") / OPTIMIZER, folder / OPTIMIZER)


def a_pipe(folder: Path) -> None:
    (folder / OPTIMIZER).unlink()
    os.mkfifo(folder / OPTIMIZER)


def manifest_bit(folder: Path) -> None:
    file = folder / manifest.MANIFEST
    place = file.read_text().index('"sha256": "') + 20
    digit = file.read_text()[place]
    file.write_text(file.read_text()[:place] + ("0" if digit != "0" else "1") + file.read_text()[place + 1 :])


DAMAGES = [
    (lambda folder: flip_bit(folder / OPTIMIZER), r"learner/optimizer\.safetensors is damaged: its digest"),
    (truncated, r"learner/optimizer\.safetensors is damaged: it has 50 bytes"),
    (lambda folder: (folder / OPTIMIZER).unlink(), r"learner/optimizer\.safetensors is missing"),
    (lambda folder: shutil.rmtree(folder / "model"), r"model/(README\.md|config\.json) is missing"),
    (empty, r"learner/optimizer\.safetensors is damaged: it has 0 bytes"),
    (step_changed, r"progress\.json is damaged: its digest"),
    (pickle_in_place, r"learner/optimizer\.safetensors is damaged"),
    (swapped, r"it was saved as step_000002 .*: another one lies in its place"),
    (swapped_file, r"learner/optimizer\.safetensors is damaged"),
    (a_pipe, r"learner/optimizer\.safetensors"),
    (lambda folder: (folder / manifest.MANIFEST).unlink(), r"manifest\.json is missing: an older version"),
    (manifest_bit, r"manifest\.json is damaged: it does not agree with its own digest"),
]
"""Each line of what is known to happen: (what is done to step_000004, what must be said)."""
