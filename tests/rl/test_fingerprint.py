"""The fingerprint of this machine is the golden one: every processor computes the quickstart's first steps alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    assert first_difference({"a": "1"}, {"a": "1", "b": "3"}) == "b"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"contract_id": 3, "stages": {}}', '{"contract_id": "x"}'])
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
