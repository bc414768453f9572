"""``python -m model.info --preset tiny``: layers, parameters and the size of a session. Allocates no weights."""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("model.info")

import torch
from transformers import InklingConfig

from model import config as shapes
from model.backbone.state import session_bytes
from model.backbone.transformer import InteractionModel
from model.program.arguments import Parser
from model.program.ranges import Range, number


def parameter_counts(config: InklingConfig) -> tuple[int, int]:
    """(total, active) numbers of parameters, without the vision tower. Active: those that one token uses, so only its
    routed experts and, of each embedding table, the rows that it reads."""
    with torch.device("meta"):
        model = InteractionModel(config)
    text = config.text_config
    total = active = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        if ".mlp.experts." in name:
            active += weight.numel() // text.n_routed_experts * text.num_experts_per_tok
        elif name.endswith("embed_tokens.weight"):
            active += text.hidden_size
        elif name.endswith("embed_audio_tokens.weight"):
            active += text.hidden_size * config.audio_config.n_mel_bins
        else:
            active += weight.numel()
    return total, active


def parser() -> Parser:
    parser = Parser("model.info", __doc__)
    parser.add_argument("--preset", choices=shapes.PRESETS, required=True)
    parser.add_argument(
        "--max-tokens",
        type=number(int, Range(1, 10**8)),
        default=4096,
        help="rows a session can hold (20 or more a second)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    config = shapes.preset(given.preset)
    text = config.text_config
    total, active = parameter_counts(config)
    sliding = sum(shapes.is_sliding(text, i) for i in range(text.num_hidden_layers))
    sparse = text.mlp_layer_types.count("sparse")
    print(f"preset          {given.preset}")
    kinds = (
        f"{sliding} sliding over {text.sliding_window_size}, {text.num_hidden_layers - sliding} global; {sparse} sparse"
    )
    print(f"layers          {text.num_hidden_layers} ({kinds})")
    print(f"width           {text.hidden_size}, vocabulary {text.vocab_size}")
    experts = f"{text.num_experts_per_tok} of {text.n_routed_experts} routed, {text.n_shared_experts} shared"
    print(f"experts         {experts}, {text.moe_intermediate_size} wide")
    print(f"parameters      {total:,} total, {active:,} active")
    for dtype in (torch.float32, torch.bfloat16):
        size = session_bytes(config, given.max_tokens, dtype)
        print(f"session         {size:,} bytes for {given.max_tokens} rows in {str(dtype).removeprefix('torch.')}")
