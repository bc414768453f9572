"""Documents name what is there: files, tests, modules and links; and the changelog has the golden digests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "rollout", "reward", "rl", "tests")
DOCUMENTS = [
    "README.md",
    "kernels/docs/exactness.md",
    "kernels/docs/gpu.md",
    "rl/docs/trackers.md",
    "configs/LOG.md",
    ".github/CONTRIBUTING.md",
    ".github/CHANGELOG.md",
    *(f"{package}/README.md" for package in PACKAGES),
]
ROOMS = (*PACKAGES, "configs", ".github", ".ci")
FILE = re.compile(r"(?<![\w./{<-])([\w.][\w./*-]*\.(?:py|cpp|h|js|json|md|svg|txt|yaml))(?:::(\w+))?(?![\w/])")
LINK = re.compile(r"\]\(([^)#]+)\)")
MODULE = re.compile(rf"-m ((?:{'|'.join(PACKAGES)})(?:\.\w+)+)")


def missing(document: str, text: str) -> list[str]:
    """What a document names and the repository lacks. Paths are meant from the root or from the document's folder;
    bare file names are looked up in a package's README only, as elsewhere they may be a run's or a user's."""
    folder = (ROOT / document).parent
    lacking = [link for link in LINK.findall(text) if ":" not in link and not (folder / link).exists()]
    for path, test in FILE.findall(text):
        found = [*ROOT.glob(path), *folder.glob(path)] if ".." not in path else [(folder / path).resolve()]
        if not any(file.exists() for file in found):
            first, slash, _ = path.partition("/")
            if first in ROOMS if slash else folder.name in PACKAGES and path.endswith(".py"):
                lacking.append(path)
        elif test and f"def {test}(" not in found[0].read_text():
            lacking.append(f"{path}::{test}")
    for module in MODULE.findall(text):
        at = ROOT / module.replace(".", "/")
        if not at.with_suffix(".py").exists() and not (at / "__main__.py").exists():
            lacking.append(module)
    return lacking


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_named_is_there(document: str) -> None:
    assert missing(document, (ROOT / document).read_text()) == []


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("see `kernels/opz.py`", "kernels/opz.py"),
        ("`tests/test_documents.py::test_nothing`", "tests/test_documents.py::test_nothing"),
        ("[ops](opz.md)", "opz.md"),
        ("python -m rl.trane --config x", "rl.trane"),
        ("begin with opz.py", "opz.py"),
    ],
)
def test_control_what_is_not_there_is_seen(text: str, lacks: str) -> None:
    assert missing("kernels/README.md", text) == [lacks]


def test_changelog_has_the_golden_digests() -> None:
    changelog = (ROOT / ".github/CHANGELOG.md").read_text()
    for file in ("fingerprint", "short_recipe", "quickstart"):
        golden = json.loads((ROOT / f"tests/golden/{file}.json").read_text())
        assert golden["contract_id" if file == "fingerprint" else "weights_digest"] in changelog, file
