"""Inkling's attention: fused q/k/v/r projection, short convolutions on k and v, per-head norms, relative bias.

One layer on packed rows; keys and values are stored by `model.backbone.state`. Inkling has two short convolutions here,
on k and on v. They are depthwise, so this module runs them as one call over the concatenated columns, and a layer keeps
three convolution windows (k and v, attention output, MLP output) instead of four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import InklingConfig

from kernels import ops
from kernels.layout import CONV_TAPS, PackedLinear, Segments
from model import config as shapes
from model.backbone.embed import Weight
from model.backbone.state import LayerState, Windows


class ShortConv(nn.Module):
    """Weights [C, 1, 4] of a depthwise convolution; always fp32, as Inkling keeps them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1d = Weight(channels, 1, CONV_TAPS, dtype=torch.float32)

    def taps(self) -> Tensor:
        """[C, 4], differentiable."""
        return self.conv1d.weight.view(-1, CONV_TAPS)


def short_conv(
    x: Tensor, taps: Tensor, segments: Segments, past: Windows | None, addend: Tensor | None = None
) -> Tensor:
    """Causal depthwise convolution of x [T, C] with taps [C, 4], plus ``addend`` [T, C] -> [T, C]. ``past``: the inputs
    before the first rows, as a tensor, or a callable that stores them itself (vLLM's pages); None for zeros."""
    if past is None or isinstance(past, Tensor):
        return ops.short_conv(x, taps, segments, past, addend)
    y = past(x, taps, segments)
    return y if addend is None else addend + y


@dataclass(slots=True)
class _Packed:
    """What the forward reads. Kept in one object because an attribute lookup on an nn.Module costs a microsecond, which
    matters when one token is decoded."""

    qkvr: PackedLinear
    out: PackedLinear
    q_norm: Tensor  # [head]
    k_norm: Tensor  # [head]
    rel_proj: Tensor  # [C, extent]
    kv_taps: Tensor  # [2 * kv, 4] detached


class RelativeBias(nn.Module):
    """``proj`` [d_rel, extent]: the bias at distance t of a query with relative states r [d_rel] is r @ proj[:, t]."""

    def __init__(self, d_rel: int, extent: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.empty(d_rel, extent, dtype=dtype))


class Attention(nn.Module):
    """Grouped-query attention of one layer, global or sliding."""

    packed: _Packed  # set by `pack`

    def __init__(self, config: InklingConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        text = config.text_config
        width, self.eps = text.hidden_size, text.rms_norm_eps
        self.heads, self.kv_heads, self.head_dim = shapes.heads(text, layer)
        self.window, self.first = shapes.window(text, layer), shapes.first(text, layer)
        self.scale = 1.0 / self.head_dim  # q and k are normed per head, hence not the square root
        q, kv, rel = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.heads * text.d_rel
        self.columns = (q, 2 * kv, rel)
        self.d_rel = text.d_rel
        self.q_proj = Weight(q, width, dtype=dtype)
        self.k_proj = Weight(kv, width, dtype=dtype)
        self.v_proj = Weight(kv, width, dtype=dtype)
        self.r_proj = Weight(rel, width, dtype=dtype)
        self.o_proj = Weight(width, q, dtype=dtype)
        self.k_sconv = ShortConv(kv)
        self.v_sconv = ShortConv(kv)
        self.q_norm = Weight(self.head_dim, dtype=dtype)
        self.k_norm = Weight(self.head_dim, dtype=dtype)
        extent = text.sliding_window_size if shapes.is_sliding(text, layer) else text.rel_extent
        self.rel_logits_proj = RelativeBias(text.d_rel, extent, dtype)

    def _kv_taps(self) -> Tensor:
        return torch.cat((self.k_sconv.taps(), self.v_sconv.taps()))

    def derived(self) -> dict[str, Tensor]:
        """Tensors computed from the parameters that the forward reads beside the packs (`model.weights.packs`)."""
        return {"kv_taps": self._kv_taps().detach()}

    def pack(self) -> None:
        self.packed = _Packed(
            qkvr=ops.pack_linear(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.r_proj.weight),
            out=ops.pack_linear(self.o_proj.weight),
            q_norm=self.q_norm.weight,
            k_norm=self.k_norm.weight,
            rel_proj=self.rel_logits_proj.proj,
            **self.derived(),
        )

    def repack(self) -> None:
        ops.repack(self.packed.qkvr)
        ops.repack(self.packed.out)
        self.packed.kv_taps = self.derived()["kv_taps"]

    def forward(self, x: Tensor, segments: Segments, state: LayerState | None, tau: Tensor | None) -> Tensor:
        """x [T, D], normed -> [T, D]. tau fp32 [T] multiplies the attention scores of global layers (see
        `model.config.log_scale_table`); None in sliding layers."""
        w, rows, head = self.packed, x.shape[0], self.head_dim
        q, kv, rel = ops.linear(x, w.qkvr).split(self.columns, 1)
        taps = self._kv_taps() if torch.is_grad_enabled() else w.kv_taps
        kv = short_conv(kv, taps, segments, None if state is None else state.kv_conv).view(rows, -1, head)
        k, v = kv[:, : self.kv_heads], kv[:, self.kv_heads :]
        out = ops.attention(
            ops.rms_norm(q.view(rows, -1, head), w.q_norm, self.eps),
            ops.rms_norm(k, w.k_norm, self.eps),
            v,
            rel.view(rows, -1, self.d_rel),
            w.rel_proj,
            segments,
            scale=self.scale,
            window=self.window,
            first=self.first,
            tau=tau,
            cache=None if state is None else state.kv,
        )
        return ops.linear(out.view(rows, -1), w.out)
