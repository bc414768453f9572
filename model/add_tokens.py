"""Adds to a checkpoint's tokenizer the tokens that a conversation needs and that it lacks.

    python -m model.add_tokens FOLDER

A tokenizer of Inkling has tokens for sound and pictures, whose ids its config names and whose texts say nothing
(``<|unused_200053|>``); `add_tokens` gives them their names in ``tokenizer_config.json``. It has none for the modes
listen, speak and delegate and for a chunk's end: these are added after its last one. No tensor changes, because Inkling
pads its vocabulary: of 201,024 rows of the embedding and of the head 200,058 have tokens. ``unpadded_vocab_size`` grows
with them. What the new rows hold is what they were initialised with: the warm start is where they are learnt.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("model.add_tokens")

import tempfile
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.config import from_json
from model.program.arguments import Parser
from model.program.files import write_json, write_whole
from model.program.folders import locked
from model.program.reading import UnreadableError, read_bytes, read_object
from model.tokenizer import FILE, NAMES, SETTINGS, disagreements, read_tokenizer, save_tokenizer, size, token_text
from model.weights.manifest import MANIFEST

CONFIG = "config.json"
PLACEHOLDERS = {"audio": "audio_token_id", "image": "image_token_id"}
"""Names whose token a config tells: its field."""


def parser() -> Parser:
    parser = Parser("model.add_tokens", __doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint in transformers' format, with its tokenizer's files")
    return parser


def main(arguments: list[str] | None = None) -> None:
    folder = parser().parse_args(arguments).folder
    with locked(folder):
        added = add_tokens(folder)
    print("\n".join(f"{text} is token {i}" for text, i in added.items()) or "nothing is missing")


def add_tokens(folder: Path) -> dict[str, int]:
    """Changes ``tokenizer.json``, ``tokenizer_config.json`` and ``config.json`` in ``folder``, each whole; gives the
    added tokens' ids by text. Raises MetronomeError, with nothing written, for a folder of a run, for files that cannot
    be read, for a vocabulary without room, and where tokenizer and config would still disagree."""
    if any((place / MANIFEST).exists() for place in (folder, folder.resolve().parent)):
        raise MetronomeError(f"{folder}: a run saved this checkpoint, with its own tokenizer; it is left as it is")
    try:
        stored = read_object(folder / CONFIG)
        config = from_json(stored)
        tokenizer = read_tokenizer(folder)
    except UnreadableError as error:
        raise MetronomeError(f"{folder}: {error.problem}") from None
    except ValueError as error:
        raise MetronomeError(f"{folder}: {CONFIG}: {error}") from None
    known = tokenizer.get_vocab()
    texts = {i: text for text, i in known.items()}
    named = {
        f"{name}_token": texts[getattr(config, field)]
        for name, field in PLACEHOLDERS.items()
        if token_text(tokenizer, name) not in known and getattr(config, field) in texts
    }
    missing = [token_text(tokenizer, name) for name in NAMES if f"{name}_token" not in named]
    missing = [text for text in missing if text not in known]
    first, rows = size(tokenizer), config.text_config.vocab_size
    if first + len(missing) > rows:
        raise MetronomeError(
            f"{folder}: {len(missing)} tokens are missing: {', '.join(missing)}. The {rows} rows of the vocabulary "
            f"have room for {max(0, rows - first)}: take a model with a padded vocabulary, or enlarge it"
        )
    settings: dict[str, Any] = {"model_specific_special_tokens": named} if named else {}
    if not (own_bos := tokenizer.bos_token is not None):
        settings["bos_token"] = "<|bos|>"
    tokenizer = read_tokenizer(folder, **settings)
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    ids = tokenizer.get_vocab()
    text = dict(stored.get("text_config") or {})
    if config.text_config.unpadded_vocab_size is not None:
        text["unpadded_vocab_size"] = max(config.text_config.unpadded_vocab_size, size(tokenizer))
    if not own_bos:
        text["bos_token_id"] = ids["<|bos|>"]
    stored["text_config"] = text
    if wrong := disagreements(tokenizer, from_json(stored)):
        raise MetronomeError(f"{folder}: tokenizer and config would still not fit: {'; '.join(wrong)}")
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(tokenizer, Path(temporary))
        for name in (FILE, SETTINGS):
            write_whole(folder / name, read_bytes(Path(temporary) / name))
    write_json(folder / CONFIG, stored)
    return {text: ids[text] for text in missing}


if __name__ == "__main__":
    main()
