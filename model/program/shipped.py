"""Recipes that come with the program, by name: ``--config quickstart`` from any folder.

In a checkout they lie in configs/; a wheel has a copy of that folder in this package (setup.py puts it there).
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of a wheel, of a checkout


def shipped(name: str) -> Path | None:
    """The file of the shipped recipe ``name`` ("quickstart", "accelerate/cpu"); None when there is none."""
    paths = (folder / f"{name}.yaml" for folder in FOLDERS)
    return next((path for path in paths if path.is_file()), None) if _plain(name) else None


def names() -> list[str]:
    """The names of all shipped recipes."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return sorted(path.stem for path in folder.glob("*.yaml"))


def resolve(given: str) -> str:
    """The path of the shipped recipe named ``given``; ``given`` itself if it is a file or names no shipped recipe (it
    may also be a recipe's text)."""
    path = shipped(given)  # first, because is_file raises for a name as long as a recipe's text
    return given if path is None or Path(given).is_file() else str(path)


def _plain(name: str) -> bool:
    return bool(name) and all(part.replace("_", "").isalnum() for part in name.split("/"))
