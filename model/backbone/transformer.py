"""The interaction model: Inkling on packed rows. One forward serves prefill, decode and the learner.

Rows of many sequences come one after another, `Segments` says which row continues which sequence; there is no batch
axis and no padding. With a `SessionState` rows continue what it holds; without one every segment is a whole sequence
and autograd works. Parameter names are those of transformers' `InklingForConditionalGeneration`, so state dicts
interchange. Left out: multi-token prediction.

The forward reads packed copies of the weights: call `pack` once after loading; after each update call `mark_changed`,
then `repack`. A forward between the two raises StaleWeightsError (`model.weights.packs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import InklingConfig

from kernels import ops
from kernels.checks.weights import stale_weights
from kernels.errors import MetronomeError
from kernels.layout import Generation, PackedLinear, Segments
from model import config as shapes
from model.backbone.attention import Attention, ShortConv, short_conv
from model.backbone.embed import AudioTower, TextEmbedding, Weight
from model.backbone.moe import DenseMLP, MixtureOfExperts
from model.backbone.state import LayerState, SessionState
from model.backbone.vision import VisionTower
from model.inputs import Inputs, Placed
from model.tokenizer import shipped
from model.voice.flow import ZERO, FlowHead
from model.weights import packs
from model.weights.draws import near_normal

Capture = list[tuple[str, Tensor]]
"""(sub-block's name, its output [T, D]) in the order of computation."""


@dataclass(slots=True)
class _Packed:
    """What a layer's forward reads. Kept in one object because an attribute lookup on an nn.Module costs about a
    microsecond, and decoding one token takes some hundred."""

    attention: Callable[..., Tensor]
    mlp: Callable[[Tensor], Tensor]
    attn_norm: Tensor  # [D]
    mlp_norm: Tensor  # [D]
    attn_taps: Tensor  # [D, 4] detached
    mlp_taps: Tensor  # [D, 4] detached


class Layer(nn.Module):
    """Attention and MLP, each with a norm before it and a short convolution after it, on the residual stream."""

    packed: _Packed  # set by `pack`

    def __init__(self, config: InklingConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        text = config.text_config
        self.name, self.eps, self.is_global = f"layers.{layer}", text.rms_norm_eps, not shapes.is_sliding(text, layer)
        self.self_attn = Attention(config, layer, dtype)
        sparse = text.mlp_layer_types[layer] == "sparse"
        self.mlp = MixtureOfExperts(config, dtype) if sparse else DenseMLP(config, dtype)
        self.input_layernorm = Weight(text.hidden_size, dtype=dtype)
        self.post_attention_layernorm = Weight(text.hidden_size, dtype=dtype)
        self.attn_sconv = ShortConv(text.hidden_size)
        self.mlp_sconv = ShortConv(text.hidden_size)

    def pack(self) -> None:
        self.self_attn.pack()
        self.mlp.pack()
        self._look_up()

    def repack(self) -> None:
        self.self_attn.repack()
        self.mlp.repack()
        self._look_up()

    def derived(self) -> dict[str, Tensor]:
        """Tensors computed from the parameters that the forward reads beside the packs (`model.weights.packs`)."""
        return {"attn_taps": self.attn_sconv.taps().detach(), "mlp_taps": self.mlp_sconv.taps().detach()}

    def _look_up(self) -> None:
        self.packed = _Packed(
            attention=self.self_attn.forward,
            mlp=self.mlp.forward,
            attn_norm=self.input_layernorm.weight,
            mlp_norm=self.post_attention_layernorm.weight,
            **self.derived(),
        )

    def run(
        self, x: Tensor, segments: Segments, state: LayerState | None, tau: Tensor | None, capture: Capture | None
    ) -> Tensor:
        """x [T, D] -> [T, D]; see `Attention.forward` for ``tau``, `InteractionModel.forward` for ``capture``."""
        w = self.packed
        attn_taps, mlp_taps = w.attn_taps, w.mlp_taps
        if torch.is_grad_enabled():
            attn_taps, mlp_taps = self.attn_sconv.taps(), self.mlp_sconv.taps()
        attn_past, mlp_past = (None, None) if state is None else (state.attn_conv, state.mlp_conv)
        h = w.attention(ops.rms_norm(x, w.attn_norm, self.eps), segments, state, tau)
        if capture is not None:
            capture.append((f"{self.name}.self_attn", h))
        x = short_conv(h, attn_taps, segments, attn_past, x)
        h = w.mlp(ops.rms_norm(x, w.mlp_norm, self.eps))
        if capture is not None:
            capture.append((f"{self.name}.mlp", h))
        x = short_conv(h, mlp_taps, segments, mlp_past, x)
        if capture is not None:
            capture.append((self.name, x))
        return x


class LanguageModel(nn.Module):
    """Holds embedding, layers and final norm under transformers' names."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        text = config.text_config
        self.embed_tokens = TextEmbedding(config, dtype)
        self.layers = nn.ModuleList()  # filled by `InteractionModel`
        self.norm = Weight(text.hidden_size, dtype=dtype)


class Backbone(nn.Module):
    """Holds language model and towers under transformers' names."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.language_model = LanguageModel(config, dtype)
        self.audio_tower = AudioTower(config, dtype)
        self.vision_tower = VisionTower(config, dtype)


class InteractionModel(nn.Module):
    """See the module's text. Use: construct, `init_weights` or load, `pack`, then call."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype = torch.float32) -> None:
        """Weights are allocated, not set. Convolution taps and the router's bias are fp32 whatever ``dtype`` is."""
        super().__init__()
        shapes.check(config)
        self.config, self.dtype = config, dtype
        self.text = text = config.text_config
        self.model = Backbone(config, dtype)
        layers = (Layer(config, i, dtype) for i in range(text.num_hidden_layers))
        self.layers = list(layers)  # typed, and without ModuleList's cost; registered below under transformers' name
        self.model.language_model.layers.extend(self.layers)
        spoken = shapes.voice(config)
        self.voice_head = None if spoken is None else FlowHead(spoken, text.hidden_size, dtype)
        self.lm_head = Weight(text.vocab_size, text.hidden_size, dtype=dtype)
        self.vocab = text.unpadded_vocab_size or text.vocab_size
        self.eps = text.rms_norm_eps
        self.multiplier = text.logits_mup_width_multiplier
        self.senses = shapes.senses(config)
        self.packed: PackedLinear | None = None  # the output head's
        self.generation = Generation()  # counts the updates of the weights
        # Of a model that keeps packed copies in place of weights: the weights' digest, `_version` of what it still has.
        self.packed_digest: tuple[str, tuple[int, ...]] | None = None
        self._versions: tuple[int, ...] = ()  # `_present()` at the last pack
        self.tau: Tensor | None = None  # `log_scale_table`, fp32 on the CPU, when log scaling is on
        self.tokenizer = shipped(config)  # None: no text; a checkpoint's own replaces it (`model.weights.checkpoint`)

    @property
    def device(self) -> torch.device:
        return self.model.language_model.norm.weight.device  # of a weight that no pack replaces

    @property
    def sound_steps(self) -> int | None:
        """Steps of the chains of its sound; None without a voice."""
        return None if self.voice_head is None else self.voice_head.config.steps

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialises each weight from ``seed`` and its name alone. Norms and scales are 1, `ZERO` 0; the rest is by
        `model.weights.draws.near_normal` with standard deviation 1/sqrt(fan_in) for matrices, 1 for embeddings, 0.02
        for convolution taps and the relative bias (near "no effect")."""
        for name, weight in sorted(self.named_parameters()):
            if name.endswith(("norm.weight", "global_scale")):
                weight.fill_(1.0)
                continue
            if name.endswith(ZERO):
                weight.zero_()
                continue
            if name.endswith("embed_tokens.weight"):
                std = 1.0
            elif name.endswith("embed_audio_tokens.weight"):
                std = 1.0 / math.sqrt(self.config.audio_config.n_mel_bins)  # a sum over channels
            elif name.endswith(("conv1d.weight", "rel_logits_proj.proj")):
                std = 0.02
            else:
                std = 1.0 / math.sqrt(weight.shape[-1])
            draws = near_normal(f"weights/{seed}/{name}", weight.numel())
            weight.copy_(torch.from_numpy(draws).view(weight.shape) * std)
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
        self.mark_changed()

    @torch.no_grad()
    def pack(self) -> None:
        """Builds the packed weights for the active backend. Call it once, before the first forward."""
        self.need_weights("pack")
        for _, pack_part in self.packers():
            pack_part()
        self.end_packing()

    def packers(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """(beginning of its weights' names, what packs it) for each part of the model that has packs. Who packs part by
        part calls `end_packing` at the end."""
        for i, layer in enumerate(self.layers):
            yield f"model.language_model.layers.{i}.", layer.pack
        yield "model.vision_tower.", self.model.vision_tower.pack
        yield "lm_head.", self._pack_head
        if self.voice_head is not None:
            yield "voice_head.", self.voice_head.pack

    def _pack_head(self) -> None:
        self.packed = ops.pack_linear(self.lm_head.weight)

    def end_packing(self) -> None:
        """To be called when all parts are packed."""
        self.tau = shapes.log_scale_table(self.config.text_config)
        packs.mark_current(self, self.generation)
        self._versions = self._present()

    def need_weights(self, purpose: str) -> None:
        """Raises MetronomeError for a model of which only packed copies were kept (`model.weights.checkpoint.load`)."""
        if self.packed_digest is not None:
            raise MetronomeError(
                f"{purpose}: this model was loaded for inference only, and its weights were not kept beside their "
                "packed copies; load it with its weights (keep_weights)"
            )

    @torch.no_grad()
    def repack(self) -> None:
        """Refreshes the packed weights in place from the parameters; needed after each update. Raises RuntimeError
        before `pack`."""
        self.need_weights("repack")
        if self.packed is None:
            raise RuntimeError("InteractionModel.repack: nothing is packed yet; call pack() first")
        for layer in self.layers:
            layer.repack()
        self.model.vision_tower.repack()
        if self.voice_head is not None:
            self.voice_head.repack()
        ops.repack(self.packed)
        self._versions = self._present()

    def mark_changed(self) -> None:
        """To be called after any change of the weights: until `repack` every forward raises StaleWeightsError."""
        self.need_weights("a change of the weights")
        self.generation.now += 1

    def _present(self) -> tuple[int, ...]:
        """torch's count of in-place changes of each parameter."""
        return tuple(p._version for p in self.parameters())

    def place(self, inputs: Inputs, state: SessionState | None, *more: Tensor) -> Placed:
        """``inputs`` beside the kernels for one forward pass, and with them all that the host knows of it before, in
        one copy: of ``more``, too, which the caller's own ops will need. Raises ValueError for a token or a code that
        the embeddings lack."""
        tables = () if state is None else state.tables
        factors = self._factors(inputs.segments)
        tau = () if factors is None else (factors,)
        patches = inputs.patches
        sound = (inputs.codes, inputs.audio_rows)
        video = (patches.pictures, patches.inside, patches.steps(), inputs.image_rows)
        own = (inputs.own, inputs.own_rows)
        segments, parts = ops.upload(inputs.segments, tables, inputs.tokens, *sound, *video, *own, *tau, *more)
        if segments is not inputs.segments or parts[0] is not inputs.tokens:
            # There is another device, on which a lookup of what is not there would not raise.
            self._check_ids(inputs)
        tokens, codes, audio_rows, pictures, inside, steps, image_rows, said, own_rows, *rest = parts
        return Placed(
            tokens, codes, audio_rows, pictures, inside, steps, image_rows, said, own_rows, segments,
            tau=rest[0] if tau else None, more=tuple(rest[len(tau) :]),
        )  # fmt: skip

    def _check_ids(self, inputs: Inputs) -> None:
        audio = self.config.audio_config
        for name, ids, count in (
            ("token", inputs.tokens, self.config.text_config.vocab_size),
            ("code", inputs.codes, audio.mel_vocab_size),
            ("code", inputs.own, audio.mel_vocab_size),
        ):
            if ids.device.type != "cpu" or not ids.numel():
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= count:
                raise ValueError(f"InteractionModel: {name} {low if low < 0 else high} is outside 0..{count - 1}")

    def forward(
        self,
        inputs: Inputs | Placed,
        state: SessionState | None = None,
        capture: Capture | None = None,
    ) -> Tensor:
        """T input rows -> hidden states [T, D] on the model's device, after the final norm and the division by the muP
        multiplier (`logits_mup_width_multiplier`).

        ``inputs`` that are not placed yet are placed first (`place`). Their segments are what ``state.extend``
        returned, or, without state, say that every segment is a whole sequence. ``capture`` collects the output of each
        sub-block, to find the first layer where two runs differ. Raises RuntimeError before `pack`, StaleWeightsError
        between an update and `repack`."""
        placed = inputs if isinstance(inputs, Placed) else self.place(inputs, state)
        x = self.embed(placed)
        if capture is not None:
            capture.append(("embed", x))
        return self._run(x, placed.segments, None if state is None else state.layers, placed.tau, capture)

    def run(self, x: Tensor, segments: Segments, layers: Sequence[LayerState] | None = None) -> Tensor:
        """As `forward`, but from embedded rows x [T, D]; ``layers``: each layer's state, None for whole sequences."""
        tau = self._factors(segments)
        tau = None if tau is None else tau.to(x.device, non_blocking=True)
        return self._run(x, segments, layers, tau, None)

    def _factors(self, segments: Segments) -> Tensor | None:
        """The factor on global layers' scores of each row, fp32 [T] on the CPU; None when log scaling is off."""
        return self.tau if self.tau is None else shapes.log_scale(self.text, self.tau, segments.position.cpu())

    def _run(
        self,
        x: Tensor,
        segments: Segments,
        layers: Sequence[LayerState] | None,
        tau: Tensor | None,
        capture: Capture | None,
    ) -> Tensor:
        if self.packed is None:
            raise RuntimeError("InteractionModel: weights are not packed; call pack() before the first forward")
        if torch.is_grad_enabled():
            self.need_weights("a forward pass for gradients")
            if self._versions != self._present():  # changed without mark_changed
                raise stale_weights("InteractionModel")
        for i, layer in enumerate(self.layers):
            layer_tau = tau if layer.is_global else None
            x = layer.run(x, segments, None if layers is None else layers[i], layer_tau, capture)
        hidden = ops.rms_norm(x, self.model.language_model.norm.weight, self.eps)
        return hidden if self.multiplier == 1.0 else hidden / self.multiplier

    @property
    def embedders(self) -> tuple[nn.Module, ...]:
        """The modules with whose weights `embed` computes."""
        towers = self.model
        return towers.language_model.embed_tokens, towers.audio_tower, towers.vision_tower

    def embed(self, placed: Placed) -> Tensor:
        """T input rows -> [T, D], what `run` takes."""
        tokens, towers = placed.tokens, self.model
        rows, heard, shown = tokens.shape[0], placed.audio_rows.shape[0], placed.image_rows.shape[0]
        if heard == rows:
            return towers.audio_tower(placed.codes)
        x = towers.language_model.embed_tokens(tokens)
        if heard:
            x = x.index_copy(0, placed.audio_rows, towers.audio_tower(placed.codes))
        if shown:
            patches = towers.vision_tower(placed.pictures, placed.inside, placed.steps)
            x = x.index_copy(0, placed.image_rows, patches)
        if placed.own_rows.shape[0]:
            own = x.index_select(0, placed.own_rows) + towers.audio_tower(placed.own)
            x = x.index_copy(0, placed.own_rows, own)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> fp32 [R, V]; V is the vocabulary without its padding. Raises RuntimeError before `pack`."""
        if self.packed is None:
            raise RuntimeError("InteractionModel: weights are not packed; call pack() before the first forward")
        logits = ops.linear(hidden, self.packed, torch.promote_types(hidden.dtype, torch.float32))
        return logits if self.vocab == logits.shape[1] else logits[:, : self.vocab].contiguous()
