"""Checkpoints: a folder of ``config.json``, ``model.safetensors``, under transformers' parameter names, and the
tokenizer's files (`model.tokenizer`).

`load` also reads what transformers' ``save_pretrained`` and Inkling's own releases write: sharded files, and Inkling's
original names, where gate and up rows of an MLP are interleaved in one tensor. A folder is written atomically.
Multi-token prediction, which this model does not build, is dropped. A folder inside a run's checkpoint is checked
against the checkpoint's manifest before it is read
(`model.weights.manifest`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import InklingConfig, PreTrainedTokenizerFast

from kernels import dispatch
from model.backbone.transformer import InteractionModel
from model.config import DTYPES, from_json, global_sight
from model.context import ContextConfig, give
from model.program.files import whole_folder, write_whole
from model.program.memory import return_freed
from model.program.ranges import shown
from model.program.reading import UnreadableError, one_line, read_object, read_record
from model.program.recipe import flat
from model.tokenizer import disagreements, has_tokenizer, read_tokenizer, save_tokenizer, shipped
from model.weights import manifest, packs, pickles, tensors
from model.weights.finite import check_finite
from model.weights.manifest import CheckpointError as CheckpointError
from model.weights.renames import Parts, renamed, shape_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# Fields that do not change what is computed, or that a library stamps on its own.
IGNORED_FIELDS = ("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "initializer_range")

DROPPED = "model.mtp."
"""Beginning of the names of weights that this model does not compute with."""


def save(model: InteractionModel, folder: Path | str) -> None:
    """Writes the model to ``folder`` atomically; an older checkpoint of that name is replaced. Raises NotFiniteError,
    with the older one kept, for weights that are not finite."""
    content = weights(model)
    check_finite(f"checkpoint {folder}", content.items(), "it was not saved. Lower the learning rate")
    with whole_folder(Path(folder)) as temporary:
        config = model.config.to_dict() | {"architectures": ["InklingForConditionalGeneration"]}
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        write_whole(temporary / CONFIG, f"{text}\n".encode())
        save_file(content, temporary / WEIGHTS, metadata={"format": "pt"})
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, temporary)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU and contiguous, as safetensors needs them. Raises MetronomeError for a
    model that was loaded without keeping them."""
    _need_weights(model, "saving or sending the weights")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    context: ContextConfig | None = None,
    pack: bool = True,
    keep_weights: bool = True,
) -> InteractionModel:
    """The model in ``folder``, packed, in ``dtype`` (default: the stored one); ``context``: what it is to remember of
    a session (default: what its config says). Raises CheckpointError when the folder is missing, damaged or of another
    architecture, NotFiniteError for weights that are not finite.

    Tensors are read one at a time, so memory holds the model and one tensor of a file. Weights and packed copies
    together are about twice the weights; ``pack=False`` leaves out the copies, and ``keep_weights=False`` every weight
    of which there is a copy: each part of the model is packed as soon as it is read. Such a model is for inference
    only: it refuses gradients, changes, `repack` and saving, and `weights_digest` is that of what was read."""
    folder = Path(folder)
    config, stored_dtype = _stored_config(folder)
    config = config if context is None else give(config, context)
    if dtype is None and stored_dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"checkpoint {folder}: {CONFIG} has dtype {str(stored_dtype).removeprefix('torch.')}; float32 and bfloat16 "
            "are computed: convert it"
        )
    with torch.device("meta"):
        model = InteractionModel(config, dtype or stored_dtype)
    model.tokenizer = _tokenizer(folder, config)
    places = _check_fits(model, folder, _files(folder))  # before memory is taken
    if not keep_weights:
        _fill_packs(model, folder, places)
        return model
    model.to_empty(device=dispatch.device())
    _fill(model, folder, places)
    if pack:
        model.pack()
    return model


def config_of(folder: Path | str) -> InklingConfig:
    """The config of the model in ``folder``. Raises CheckpointError when there is none, or of another architecture."""
    return _stored_config(Path(folder))[0]


def tokenizer_of(folder: Path | str) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the model in ``folder`` (`InteractionModel.tokenizer`). Raises CheckpointError as `load` does,
    without looking at the weights."""
    return _tokenizer(Path(folder), config_of(folder))


def load_into(model: InteractionModel, folder: Path | str) -> None:
    """Fills ``model`` with the weights in ``folder`` and packs them. Raises CheckpointError and NotFiniteError as
    `load` does, and CheckpointError when the configs differ, naming the fields."""
    folder = Path(folder)
    model.need_weights(f"loading {folder}")
    if fields := config_differences(model.config, _stored_config(folder)[0]):
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {'; '.join(fields)}. Change the config or the checkpoint"
        )
    model.tokenizer = _tokenizer(folder, model.config)
    _fill(model, folder, _check_fits(model, folder, _files(folder)))
    model.pack()


def read_packs(model: InteractionModel, file: Path) -> None:
    """Packs the weights in a file of what `weights` gave, and keeps of them only those that are not packed, as `load`
    does with ``keep_weights=False``. ``model``: on the meta device, or filled so before; its packs are then replaced.
    Raises CheckpointError and NotFiniteError as `load` does."""
    _fill_packs(model, file, _check_fits(model, file, [file]))


def _stored_config(folder: Path) -> tuple[InklingConfig, torch.dtype]:
    """(config, dtype) in ``folder``, read after the folder's files were checked against a manifest, if it has one."""
    manifest.check_loaded(folder)
    if problem := pickles.problem_of(folder):
        raise CheckpointError(f"checkpoint {folder}: {problem}")
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"checkpoint {folder}: there is no {CONFIG}; name a folder that a run saved")
    try:
        stored = read_object(folder / CONFIG)
        if stored.get("model_type") != InklingConfig.model_type:
            raise UnreadableError(
                "", f"model_type is {shown(stored.get('model_type'))}, not {InklingConfig.model_type!r}"
            )
        return from_json(stored), DTYPES[_dtype_in(stored)]
    except UnreadableError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {CONFIG} is damaged ({error.problem}); use another checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(one_line(f"checkpoint {folder}: {CONFIG}: {error}; use another checkpoint")) from None


def _dtype_in(stored: dict[str, Any]) -> str:
    """The name of the weights' type; Inkling's releases have it with the text model's fields."""
    for part in (stored, stored.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(name):
                return str(part[name])
    return "float32"


def _tokenizer(folder: Path, config: InklingConfig) -> PreTrainedTokenizerFast | None:
    """The tokenizer in ``folder``; the shipped one, if it fits, for a folder without."""
    if not has_tokenizer(folder):
        return shipped(config)
    try:
        tokenizer = read_tokenizer(folder)
    except UnreadableError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}; copy the tokenizer's files again") from None
    if wrong := disagreements(tokenizer, config):
        raise CheckpointError(
            one_line(f"checkpoint {folder}: its tokenizer and its config do not fit: {'; '.join(wrong)}")
        )
    return tokenizer


def config_differences(wanted: InklingConfig, stored: InklingConfig) -> list[str]:
    """Each differing field as ``name: wanted … , stored …``."""
    a, b = dict(flat(wanted.to_dict())), dict(flat(stored.to_dict()))
    return [
        f"{name}: wanted {a.get(name)!r}, stored {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name.rsplit(".", 1)[-1] not in IGNORED_FIELDS
    ]


@dataclass(frozen=True)
class _Place:
    """Where a weight is stored."""

    file: Path
    name: str  # the stored tensor's, which may hold other weights, too


def _check_fits(model: InteractionModel, folder: Path, files: list[Path]) -> dict[str, _Place]:
    """Weight -> where it is stored. Raises CheckpointError for names or shapes that are not those of the model; takes
    no memory."""
    target, places, wrong = model.state_dict(), dict[str, _Place](), []
    for file in files:
        with _refusing(folder, file):
            for stored, tensor in tensors.shapes(file):
                for name, parts in _renamed(stored, tensor):
                    if name.startswith(DROPPED):
                        continue
                    if name not in target:
                        wrong.append(f"{name} is unknown")
                    elif list(target[name].shape) != shape_of(parts):
                        wrong.append(f"{name} is {shape_of(parts)}, not {list(target[name].shape)}")
                    elif name in places:
                        wrong.append(f"{name} comes twice")
                    places[name] = _Place(file, stored)
    wrong += [f"{name} is missing" for name in sorted(target.keys() - places.keys())]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            one_line(f"checkpoint {folder} does not fit its config: {'; '.join(wrong[:5])}{more}. Use another one")
        )
    return places


def _fill(model: InteractionModel, folder: Path, places: dict[str, _Place]) -> None:
    """Copies every stored weight into the model, which they fit (`_check_fits`)."""
    files = tensors.Files()
    for name, tensor in model.state_dict().items():
        _read(files, folder, name, places[name], tensor)


def _fill_packs(model: InteractionModel, folder: Path, places: dict[str, _Place]) -> None:
    """`_fill` for a model whose weights are not to be kept: packs each part of it when its weights were read, and then
    drops those of which there is a copy."""
    digest, device, packers = hashlib.sha256(), dispatch.device(), dict(model.packers())
    shapes, files = model.state_dict(), tensors.Files()
    model.packed_digest = "", ()  # no digest, and no forward pass with older packs, unless this comes to its end
    model.generation.now += 1

    def part_of(name: str) -> str:
        return next((part for part in packers if name.startswith(part)), "")

    # In the order of names, in which they are digested; there a part's weights, with one beginning, follow each other.
    for part, names in groupby(sorted(shapes), part_of):
        for name in names:
            tensor = torch.empty_like(shapes[name], device=device)
            _read(files, folder, name, places[name], tensor)
            _add(digest, name, tensor)
            owner, _, field = name.rpartition(".")
            is_buffer = field in dict(model.get_submodule(owner).named_buffers(recurse=False))
            value = tensor if is_buffer else nn.Parameter(tensor, requires_grad=False)
            setattr(model.get_submodule(owner), field, value)
        if part:
            with torch.no_grad():
                packers.pop(part)()
            packs.release(model)
            return_freed()
    model.end_packing()
    _add_sight(digest, model)
    model.packed_digest = digest.hexdigest()[:32], _versions(model)


@torch.no_grad()
def _read(files: tensors.Files, folder: Path, name: str, place: _Place, target: Tensor) -> None:
    """Copies a stored weight into ``target``, by its parts. Raises NotFiniteError."""
    with _refusing(folder, place.file):
        views, axis = dict(_renamed(place.name, files.tensor(place.file, place.name)))[name]
    if len(views) == 1:
        target.copy_(views[0])
    else:
        for part, view in zip(target.split([view.shape[axis] for view in views], axis), views, strict=True):
            part.copy_(view)
    check_finite(f"checkpoint {folder}", [(name, target)], "use another checkpoint")


def _renamed(stored: str, tensor: Tensor) -> Iterator[tuple[str, Parts]]:
    try:
        yield from list(renamed(stored, tensor))
    except (RuntimeError, IndexError):  # what should interleave two, and is no multiple of two
        raise UnreadableError("", f"is damaged ({stored} is {list(tensor.shape)})") from None


@contextmanager
def _refusing(folder: Path, file: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableError as error:
        raise CheckpointError(f"checkpoint {folder}: {file.name} {error.problem}; use another checkpoint") from None


def _files(folder: Path) -> list[Path]:
    """The files of weights in ``folder``: one, or those that an index names."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    try:
        named = sorted(set(read_record(folder / INDEX, _Index).weight_map.values()))
        if not named:
            raise UnreadableError("", "it names no file")
        if outside := [name for name in named if Path(name).name != name]:
            raise UnreadableError("", f"it names {shown(outside[0])}, which is no file of this folder")
    except UnreadableError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {INDEX} is damaged ({error.problem}); use another checkpoint"
        ) from None
    return [folder / name for name in named]


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]  # tensor -> file


def weights_digest(model: nn.Module) -> str:
    """The first 32 hexadecimal digits of a SHA-256 over names, dtypes, shapes and bytes of all weights, in name order;
    of a model that was loaded for inference only, those that were read then. Raises MetronomeError when what it still
    has of them was changed since.

    And over how far global layers see, where that is bounded: with equal weights it is another policy, and the learner
    must not take the one's episodes for the other's.

    SHA-256 because processors have instructions for it: this is computed after every learner step."""
    if isinstance(model, InteractionModel) and model.packed_digest is not None:
        digest, versions = model.packed_digest
        if versions != _versions(model):
            model.need_weights("a digest after a change of the weights")
        return digest
    _need_weights(model, "a digest")
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        _add(hashed, name, tensor)
    _add_sight(hashed, model)
    return hashed.hexdigest()[:32]


def _add(hashed: hashlib._Hash, name: str, tensor: Tensor) -> None:
    hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _add_sight(hashed: hashlib._Hash, model: nn.Module) -> None:
    for name, part in model.named_modules():
        if isinstance(part, InteractionModel) and (sight := global_sight(part.text))[0] is not None:
            hashed.update(f"{name} sees {sight}\n".encode())


def _versions(model: InteractionModel) -> tuple[int, ...]:
    """torch's counts of in-place changes."""
    return tuple(tensor._version for tensor in (*model.parameters(), *model.buffers()))


def _need_weights(model: nn.Module, purpose: str) -> None:
    for part in model.modules():
        if isinstance(part, InteractionModel):
            part.need_weights(purpose)
