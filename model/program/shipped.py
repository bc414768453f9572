"""Recipes that come with the program, by name: ``--config quickstart`` from any folder.

In a checkout they lie in configs/; a wheel has a copy of that folder in this package (setup.py puts it there).
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE / "configs", PACKAGE.parent / "configs")


def shipped(name: str) -> Path | None:
    """The file of the shipped recipe ``name`` ("quickstart", "accelerate/cpu"); None when there is none."""
    paths = (place / f"{name}.yaml" for place in PLACES)
    return next((path for path in paths if path.is_file()), None) if _plain(name) else None


def names() -> list[str]:
    """Of all shipped recipes."""
    place = next((place for place in PLACES if place.is_dir()), PLACES[0])
    return sorted(path.stem for path in place.glob("*.yaml"))


def resolve(given: str) -> str:
    """``given`` if it is a file or holds a recipe's text; otherwise the path of the shipped recipe of that name, if
    there is one."""
    found = shipped(given)  # first: a recipe's text may be too long to ask the disk for a file of that name
    return given if found is None or Path(given).is_file() else str(found)


def _plain(name: str) -> bool:
    return bool(name) and all(part.replace("_", "").isalnum() for part in name.split("/"))
