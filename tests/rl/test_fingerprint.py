"""The fingerprint of this machine is the golden one: every processor computes the quickstart's first steps alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from rl import fingerprint
from rl.fingerprint import first_difference

GOLDEN = Path(__file__).resolve().parents[1] / "golden/fingerprint.json"


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.usefixtures("world")
def test_this_machine_gives_the_golden_digests() -> None:
    """Where it fails, the message names the first stage: everything after it differs, too."""
    current = fingerprint.fingerprint()
    assert current["contract"] == golden()["contract"]
    assert first_difference(current["stages"], golden()["stages"]) is None
    assert current["contract_id"] == golden()["contract_id"]


@pytest.mark.usefixtures("world")
def test_control_one_bit_is_seen_and_its_stage_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of one fresh weight."""
    build = fingerprint.build_model

    def spoilt(config: Any) -> Any:
        model = build(config)
        with torch.no_grad():
            model.lm_head.weight[7, 3] = torch.nextafter(model.lm_head.weight[7, 3], torch.tensor(9.0))
        model.repack()
        return model

    monkeypatch.setattr(fingerprint, "build_model", spoilt)
    some: dict[str, str] = {}
    stages: Iterator[Any] = fingerprint.stages()
    for name, arrays in stages:
        some[name] = fingerprint._digest(arrays)
        if name == "fresh weights":
            break
    assert first_difference(some, {n: golden()["stages"][n] for n in some}) == "fresh weights"


def test_first_difference() -> None:
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) is None
    assert first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == "b"


@pytest.mark.parametrize(
    ("earlier", "verdict", "says"),
    [
        ({"a": "1", "b": "2"}, "identical", "equal to F in every stage, 2 of 2"),
        ({"a": "1", "b": "3"}, "different", "different from F, first in: b"),
        ({"a": "0", "c": "3"}, "different", "first in: a"),
        ({"a": "1"}, "nothing_compared", "F has other stages; 1 in common, all equal; 1 in one alone"),
        ({"a": "1", "b": "2", "c": "3"}, "nothing_compared", "2 in common"),
        ({"c": "3"}, "nothing_compared", "0 in common"),
        ({}, "nothing_compared", "0 in common"),
    ],
)
def test_the_verdict_on_two_fingerprints(earlier: dict[str, str], verdict: str, says: str) -> None:
    current = {"contract_id": "x", "stages": {"a": "1", "b": "2"}}
    found = fingerprint.compared(current, {"contract_id": "x", "stages": earlier}, "F")
    assert found.verdict == verdict and says in found.headline
    assert fingerprint.compared(current, {"contract_id": "y", "stages": earlier}, "F").verdict == "not_comparable"


def test_a_file_of_no_stages_ends_the_command_with_status_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = golden()
    monkeypatch.setattr(fingerprint, "fingerprint", lambda: current)
    file = tmp_path / "earlier.json"
    for stages, status in (({}, 3), (current["stages"] | {"weights": "0"}, 3), (current["stages"], 0)):
        file.write_text(json.dumps(current | {"stages": stages}))
        with pytest.raises(SystemExit, match=str(status)) if status else nullcontext():
            fingerprint.main(["--against", str(file)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"contract_id": 3, "stages": {}}',
        '{"contract_id": "x"}',
        '{"contract_id": "x", "stages": {"a": null}}',
    ],
)
def test_files_that_are_no_fingerprint(tmp_path: Path, text: str) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(text)
    with pytest.raises(MetronomeError, match=r"earlier\.json: cannot be read as a fingerprint"):
        fingerprint.main(["--against", str(file)])
    with pytest.raises(MetronomeError, match="cannot be read"):
        fingerprint.main(["--against", str(tmp_path / "nowhere.json")])


def test_readme_prints_the_quickstarts_digest_of_this_contract() -> None:
    """The whole quickstart takes minutes and is not run here; its digest is of one contract, and a change that makes
    another contract asks for a new one."""
    current = json.loads(GOLDEN.with_name("quickstart.json").read_text())
    readme = (GOLDEN.parents[2] / "README.md").read_text()
    assert current["weights_digest"] in readme
    assert current["contract_id"] == dispatch.contract_id() == golden()["contract_id"]
