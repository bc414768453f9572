"""Checkpoints: a folder of ``config.json`` and ``model.safetensors``, under transformers' parameter names.

`load` also reads what transformers' ``save_pretrained`` and Inkling's own releases write: sharded files, and Inkling's
original names, where gate and up rows of an MLP are interleaved in one tensor. A folder is written atomically.
Weights of the vision tower, which this model does not build, are kept and saved again; multi-token prediction is
dropped. A folder inside a run's checkpoint is checked against the checkpoint's manifest before it is read
(`model.weights.manifest`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import InklingConfig

from kernels import dispatch
from model.backbone.transformer import InteractionModel
from model.config import DTYPES, from_json, global_sight
from model.context import ContextConfig, give
from model.program.files import whole_folder, write_whole
from model.program.ranges import shown
from model.program.reading import UnreadableError, one_line, read_object, read_record
from model.program.recipe import flat
from model.weights import manifest, tensors
from model.weights.finite import check_finite
from model.weights.manifest import CheckpointError as CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# Fields that do not change what is computed, or that a library stamps on its own.
IGNORED_FIELDS = ("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "initializer_range")

KEPT, DROPPED = "model.vision_tower.", "model.mtp."
"""Beginnings of the names of weights that this model does not compute with."""

# Inkling's original names -> transformers' (transformers.conversion_mapping, "inkling_mm_model"), in this order.
RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^model\.llm\.embed_norm\.", "model.language_model.embed_tokens.embed_norm."),
        (r"^model\.llm\.embed\.", "model.language_model.embed_tokens."),
        (r"^model\.llm\.unembed\.", "lm_head."),
        (r"^model\.llm\.", "model.language_model."),
        (r"^model\.audio\.encoder\.", "model.audio_tower.embed_audio_tokens.embed_audio_tokens."),
        (r"^model\.audio\.final_norm\.", "model.audio_tower.norm."),
        (r"^model\.visual\.layers\.linear_(\d+)\.", r"model.vision_tower.encoder_layers.\1.projection."),
        (r"^model\.visual\.layers\.norm_(\d+)\.", r"model.vision_tower.encoder_layers.\1.layer_norm."),
        (r"^model\.visual\.", "model.vision_tower."),
        (r"\.attn\.wq_du\.", ".self_attn.q_proj."),
        (r"\.attn\.wk_dv\.", ".self_attn.k_proj."),
        (r"\.attn\.wv_dv\.", ".self_attn.v_proj."),
        (r"\.attn\.wr_du\.", ".self_attn.r_proj."),
        (r"\.attn\.wo_ud\.", ".self_attn.o_proj."),
        (r"\.attn\.([kv])_sconv\.weight$", r".self_attn.\1_sconv.conv1d.weight"),
        (r"\.attn\.", ".self_attn."),
        (r"\.(attn|mlp)_sconv\.weight$", r".\1_sconv.conv1d.weight"),
        (r"\.mlp_norm\.", ".post_attention_layernorm."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.experts\.w2_weight$", ".mlp.experts.down_proj"),
        (r"\.shared_w2_weight$", ".down_proj"),
        (r"\.mlp\.w2_md\.weight$", ".mlp.down_proj.weight"),
    )
]


def save(model: InteractionModel, folder: Path | str) -> None:
    """Writes the model to ``folder`` atomically; an older checkpoint of that name is replaced. Raises NotFiniteError,
    with the older one kept, for weights that are not finite."""
    content = weights(model) | model.passthrough
    check_finite(f"checkpoint {folder}", content.items(), "it was not saved. Lower the learning rate")
    with whole_folder(Path(folder)) as temporary:
        config = model.config.to_dict() | {"architectures": ["InklingForConditionalGeneration"]}
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        write_whole(temporary / CONFIG, f"{text}\n".encode())
        save_file(content, temporary / WEIGHTS, metadata={"format": "pt"})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU and contiguous, as safetensors needs them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load(
    folder: Path | str, dtype: torch.dtype | None = None, context: ContextConfig | None = None
) -> InteractionModel:
    """The model in ``folder``, packed, in ``dtype`` (default: the stored one); ``context``: what it is to remember of
    a session (default: what its config says). Raises CheckpointError when the folder is missing, damaged or of another
    architecture, NotFiniteError for weights that are not finite."""
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
    files = _check_fits(model, folder)  # before memory is taken
    model.to_empty(device=dispatch.device())
    _fill(model, folder, files)
    model.pack()
    return model


def config_of(folder: Path | str) -> InklingConfig:
    """The config of the model in ``folder``. Raises CheckpointError when there is none, or of another architecture."""
    return _stored_config(Path(folder))[0]


def load_into(model: InteractionModel, folder: Path | str) -> None:
    """Fills ``model`` with the weights in ``folder`` and packs them. Raises CheckpointError and NotFiniteError as
    `load` does, and CheckpointError when the configs differ, naming the fields."""
    folder = Path(folder)
    if fields := config_differences(model.config, _stored_config(folder)[0]):
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {'; '.join(fields)}. Change the config or the checkpoint"
        )
    _fill(model, folder, _check_fits(model, folder))
    model.pack()


def _stored_config(folder: Path) -> tuple[InklingConfig, torch.dtype]:
    """(config, dtype) in ``folder``, read after the folder's files were checked against a manifest, if it has one."""
    manifest.check_loaded(folder)
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"checkpoint {folder}: there is no {CONFIG}; name a folder that a run saved")
    try:
        stored = read_object(folder / CONFIG)
        if stored.get("model_type") != InklingConfig.model_type:
            raise UnreadableError(
                "", f"model_type is {shown(stored.get('model_type'))}, not {InklingConfig.model_type!r}"
            )
        return from_json(stored), DTYPES[stored.get("dtype") or "float32"]
    except UnreadableError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {CONFIG} is damaged ({error.problem}); use another checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(one_line(f"checkpoint {folder}: {CONFIG}: {error}; use another checkpoint")) from None


def config_differences(wanted: InklingConfig, stored: InklingConfig) -> list[str]:
    """Each differing field as ``name: wanted … , stored …``."""
    a, b = dict(flat(wanted.to_dict())), dict(flat(stored.to_dict()))
    return [
        f"{name}: wanted {a.get(name)!r}, stored {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name.rsplit(".", 1)[-1] not in IGNORED_FIELDS
    ]


def _check_fits(model: InteractionModel, folder: Path) -> list[Path]:
    """The files that the weights in ``folder`` are stored in. Raises CheckpointError for names or shapes that are not
    those of the model; takes no memory."""
    target, missing, wrong = model.state_dict(), set(model.state_dict()), []
    files = _files(folder)
    for name, tensor in _stored_tensors(folder, files, tensors.shapes):
        if name.startswith(KEPT) or name.startswith(DROPPED):
            continue
        if name not in target:
            wrong.append(f"{name} is unknown")
        elif target[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(tensor.shape)}, not {list(target[name].shape)}")
        elif name not in missing:
            wrong.append(f"{name} comes twice")
        missing.discard(name)
    wrong += [f"{name} is missing" for name in sorted(missing)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            one_line(f"checkpoint {folder} does not fit its config: {'; '.join(wrong[:5])}{more}. Use another one")
        )
    return files


def _fill(model: InteractionModel, folder: Path, files: list[Path]) -> None:
    """Copies every stored tensor into the model, which they fit (`_check_fits`)."""
    target = model.state_dict()
    for name, tensor in _stored_tensors(folder, files, tensors.stored):
        if name.startswith(KEPT):
            model.passthrough[name] = tensor
        elif not name.startswith(DROPPED):
            target[name].copy_(tensor)
    check_finite(f"checkpoint {folder}", (target | model.passthrough).items(), "use another checkpoint")


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


def _stored_tensors(
    folder: Path, files: list[Path], read: Callable[[Path], Iterable[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, tensor) of everything that ``read`` yields of each file."""
    try:
        for file in files:
            for name, tensor in read(file):
                try:
                    renamed = list(_renamed(name, tensor))
                except (RuntimeError, IndexError):  # what should interleave two, and is no multiple of two
                    raise UnreadableError("", f"is damaged ({name} is {list(tensor.shape)})") from None
                yield from renamed
    except UnreadableError as error:
        raise CheckpointError(f"checkpoint {folder}: {file.name} {error.problem}; use another checkpoint") from None


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    if name.endswith(".mlp.experts.w13_weight"):
        yield name.replace("w13_weight", "gate_up_proj"), torch.cat(_deinterleaved(tensor, 1), 1)
    elif name.endswith(".shared_w13_weight"):
        yield from _gate_and_up(name, "shared_w13_weight", "{}_proj", _deinterleaved(tensor, 1))
    elif name.endswith(".mlp.w13_dn.weight"):
        yield from _gate_and_up(name, "w13_dn.weight", "{}_proj.weight", _deinterleaved(tensor, 0))
    else:
        yield name, tensor


def _deinterleaved(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Rows gate 0, up 0, gate 1, … -> (gate rows, up rows)."""
    gate, up = tensor.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return gate, up


def _gate_and_up(name: str, old: str, new: str, parts: tuple[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for part, tensor in zip(("gate", "up"), parts, strict=True):
        yield name.replace(old, new.format(part)), tensor


def weights_digest(model: nn.Module) -> str:
    """The first 32 hexadecimal digits of a SHA-256 over names, dtypes, shapes and bytes of all weights, in name order.

    And over how far global layers see, where that is bounded: with equal weights it is another policy, and the learner
    must not take the one's episodes for the other's.

    SHA-256 because processors have instructions for it: this is computed after every learner step."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    for name, part in model.named_modules():
        if isinstance(part, InteractionModel) and (sight := global_sight(part.text))[0] is not None:
            digest.update(f"{name} sees {sight}\n".encode())
    return digest.hexdigest()[:32]
