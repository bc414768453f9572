"""A run of somebody else's scenario family: its module is not executed unless the user says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kernels.errors import MetronomeError
from model.program.reading import parse_yaml
from model.program.yaml_text import to_yaml
from model.weights import manifest
from rl import bestofn
from rl.audit.command import main
from rl.audit.records import read
from rollout import show
from rollout.scenarios.registry import ForeignFamilyError, find_family, shipped_only
from tests.rl.audit.runs import first_file


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module that can be imported; it tells by a file, ``executed``, that it was."""
    name = f"foreign_{request.node.name.partition('[')[0]}"
    (tmp_path / f"{name}.py").write_text(
        f"from pathlib import Path\nfrom dataclasses import replace\nPath({str(tmp_path / 'executed')!r}).touch()\n"
        "from reward.rules.timespeak import TIMESPEAK\nFAMILY = replace(TIMESPEAK)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture
def foreign(run: Path, module: str) -> Path:
    """The run, with timespeak found by a module of its own; its checkpoints are of that recipe."""
    recipe = (run / "config.yaml").read_text()
    assert "- timespeak" in recipe
    (run / "config.yaml").write_text(recipe.replace("- timespeak", f"- {module}:FAMILY"))
    for folder in (run / "checkpoints").iterdir():
        manifest.write(folder, folder.name, (run / "config.yaml").read_text())
    return run


def executed(tmp_path: Path, module: str) -> bool:
    return (tmp_path / "executed").exists() or module in sys.modules


def test_the_audit_imports_nothing_unless_told(
    foreign: Path, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--run", str(foreign), "--fail-on", "mismatch"])
    out = capsys.readouterr().out
    assert not executed(tmp_path, module)
    assert out.startswith("Audit: identical. 0 of") and out.splitlines()[-1].startswith(
        f"scenario family '{module}:FAMILY' is not one of ours: its module '{module}' was not imported"
    )
    assert "--trust-families" in out
    report = json.loads((foreign / "audit/report.json").read_text())
    assert report["gaps"][0].startswith("No episode is judged by rules") and report["rescored"]["episodes"] == 8
    main(["--run", str(foreign), "--trust-families"])
    assert executed(tmp_path, module)
    assert "--trust-families" not in capsys.readouterr().out
    assert json.loads((foreign / "audit/report.json").read_text())["gaps"] == []


def test_a_comparison_imports_nothing(
    foreign: Path, made: Path, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--compare", str(made), str(foreign), "--out", str(tmp_path / "out")])
    assert not executed(tmp_path, module) and "was not imported" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", ["scenarios.families: [{}]", "<<: {{scenarios: {{families: ['{}']}}}}"])
def test_no_other_spelling_imports_it(run: Path, module: str, tmp_path: Path, hidden: str) -> None:
    recipe = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{recipe}\n{hidden.format(f'{module}:FAMILY')}\n")
    main(["--run", str(run)])
    assert not executed(tmp_path, module)


def test_show_imports_nothing_unless_told(
    foreign: Path, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=120, highlight=False)
    for option in ("--rollout=0", "--list", "--json"):
        show.main([str(first_file(foreign)), option], console)
        assert not executed(tmp_path, module)
        assert capsys.readouterr().err.startswith(f"scenario family '{module}:FAMILY' is not one of ours")
    show.main([str(first_file(foreign)), "--trust-families"], console)
    assert executed(tmp_path, module)
    assert "by the rules" in capsys.readouterr().out


def test_best_of_n_imports_nothing_unless_told(foreign: Path, module: str, tmp_path: Path) -> None:
    arguments = ["--run", str(foreign), "--json", str(tmp_path / "out.json")]
    with pytest.raises(MetronomeError, match=r"was not imported.*--trust-families true"):
        bestofn.main(arguments)
    assert not executed(tmp_path, module)
    with pytest.raises(MetronomeError, match="has no reward models of its own"):
        bestofn.main([*arguments, "--trust-families", "true"])
    assert executed(tmp_path, module)


def test_the_guard_ends_with_its_block(module: str, tmp_path: Path) -> None:
    with shipped_only("--x") as refused:
        assert find_family("timespeak") is find_family("reward.rules.timespeak:TIMESPEAK")
        with pytest.raises(ForeignFamilyError, match="Give --x if you trust it"):
            find_family(f"{module}:FAMILY")
        assert list(refused) == [f"{module}:FAMILY"] and not executed(tmp_path, module)
    assert find_family(f"{module}:FAMILY").name == "timespeak" and executed(tmp_path, module)
    with shipped_only("--x"), pytest.raises(ForeignFamilyError):  # though it is known by now
        find_family(f"{module}:FAMILY")


def test_a_foreign_run_s_number_that_is_none_is_a_gap_that_names_the_field(foreign: Path, module: str) -> None:
    recipe = foreign / "config.yaml"
    with shipped_only("--x"):
        assert read(foreign).config is not None, "the control"
        changed = parse_yaml(recipe.read_text())
        changed["rollout"]["temperature"] = float("nan")
        recipe.write_text(to_yaml(changed))
        found = read(foreign)
    assert found.config is None and any("rollout.temperature is nan: give" in gap for gap in found.gaps), found.gaps
