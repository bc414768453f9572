"""Weights as pickles are not read: loading a pickle executes what it says, whoever wrote it. Only safetensors are."""

from __future__ import annotations

from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Ends of the names of files that `torch.save` and `pickle.dump` usually write."""
BEGINNINGS = {bytes((0x80, n)): "a pickle" for n in range(2, 6)} | {
    b"PK\x03\x04": "a zip archive, as torch.save writes"
}
"""First bytes of such files, whatever they are called. A safetensors file may begin so too, so they say something only
of a file that is none."""
CONVERT = "from transformers import AutoModelForMultimodalLM as M; M.from_pretrained('.').save_pretrained('.')"


def problem_of(folder: Path) -> str | None:
    """Why the weights in ``folder`` are not read, if there are only pickles."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not found:
        return None
    more = f" and {len(found) - 1} more" if found[1:] else ""
    return (
        f"its weights are no safetensors but {found[0]}{more}, and loading a pickle executes what is in it. If you "
        f'trust who wrote it, convert it with transformers, in that folder: python -c "{CONVERT}"'
    )


def disguised(path: Path) -> str | None:
    """What a file that is no safetensors is instead, in words, if it begins as a pickle does."""
    try:
        with path.open("rb") as file:
            first = file.read(4)
    except OSError:
        return None
    kind = next((kind for beginning, kind in BEGINNINGS.items() if first.startswith(beginning)), None)
    return kind and f"is {kind}, and no safetensors: loading it could execute what is in it, so it is not read"
