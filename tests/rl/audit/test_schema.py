"""The published schema is what the types say, holds for what an audit writes, and refuses the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rl.audit import schema
from rl.audit.compare import compare_runs
from rl.audit.document import Heading, plain
from rl.audit.page import FOLDER
from rl.audit.report import audit

PUBLISHED = (FOLDER / "schema.json").read_text()


def test_the_command_prints_what_is_published() -> None:
    command = [sys.executable, "-m", "rl.audit.schema"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == PUBLISHED


def test_other_types_give_another_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Longer(Heading):
        """With one field more."""

        gaps: Sequence[str]
        extra: int

    assert schema.text() == PUBLISHED  # the control
    monkeypatch.setattr(schema, "KINDS", (Longer,))
    assert json.loads(schema.text())["$defs"]["Longer"]["properties"]["extra"] == {"type": "integer", "minimum": 0}

    @dataclass(frozen=True)
    class Unknown:
        """Of a type that a schema cannot say."""

        path: Path

    monkeypatch.setattr(schema, "KINDS", (Unknown,))
    with pytest.raises(TypeError, match=r"no JSON schema is known for .*Path"):
        schema.text()


def test_what_an_audit_writes_is_valid_and_nothing_else(run: Path, made: Path, tmp_path: Path) -> None:
    published = json.loads(PUBLISHED)
    jsonschema.Draft202012Validator.check_schema(published)
    both: list[dict[str, Any]] = [plain(audit(run)), plain(compare_runs(made, run, tmp_path / "both"))]
    assert [report["kind"] for report in both] == ["run", "comparison"]
    for report in both:
        jsonschema.validate(report, published)
        wrongs: list[dict[str, Any]] = [
            report | wrong
            for wrong in ({"verdict": "fine"}, {"num_unequal": -1}, {"schema": "metronome.audit/1"}, {"extra": 1})
        ]
        wrongs += [{name: value for name, value in report.items() if name != left_out} for left_out in report]
        for wrong in wrongs:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, published)
