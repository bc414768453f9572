"""What a user sees: a bar on a terminal, plain lines elsewhere, nothing from the other processes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rl import display as display_module
from rl.display import Display


def metrics(unequal: int = 0) -> dict[str, float | int | str]:
    return {
        "reward/mean": -0.25,
        "reward/score": 0.625,
        "mismatch/num_tokens": 1000,
        "mismatch/num_unequal": unequal,
        "weights_digest": "ab",
    }


def shown(terminal: bool, total: int = 5, **console: object) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(True, Console(file=out, force_terminal=terminal, width=160, highlight=False)), out


def test_plain_lines_hold_step_reward_heldout_and_mismatch() -> None:
    display, out = shown(terminal=False)
    with display.phase("RL", total=3) as phase:
        phase.held_out(0.5)
        for _ in range(3):
            phase.advance(metrics())
    first, last = out.getvalue().splitlines()  # the step between is too soon after the first
    assert first.startswith("RL 1/3 · reward -0.250 · score 0.625 · held-out 50.0% · mismatch 0/1000 · ")
    assert first.endswith("left") and "s/step" in first
    assert last.startswith("RL 3/3 ") and "mismatch 0/3000" in last and last.endswith("s in all")
    assert "\x1b" not in out.getvalue()


def test_plain_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display_module, "PLAIN_EVERY_S", 0.0)
    display, out = shown(terminal=False)
    with display.phase("RL", total=3) as phase:
        for _ in range(3):
            phase.advance(metrics())
    assert [line.split(" · ")[0] for line in out.getvalue().splitlines()] == ["RL 1/3", "RL 2/3", "RL 3/3"]


def test_unequal_tokens_add_up() -> None:
    display, out = shown(terminal=False)
    with display.phase("RL", total=2) as phase:
        phase.advance(metrics(unequal=1))
        phase.advance(metrics(unequal=2))
    assert "mismatch 3/2000" in out.getvalue()


def test_terminal_gets_a_live_bar() -> None:
    display, out = shown(terminal=True)
    with display.phase("warm start", total=2) as phase:
        phase.advance({"warmstart/loss": 1.5})
        phase.advance({"warmstart/loss": 0.75})
    text = out.getvalue()
    assert "\x1b" in text and "warm start" in text and "2/2" in text and "loss 0.750" in text


def test_a_resumed_phase_goes_on_counting() -> None:
    display, out = shown(terminal=False)
    with display.phase("RL", total=10, done=8) as phase:
        phase.advance(metrics())
    assert out.getvalue().startswith("RL 9/10 ")


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    display = Display(False)
    display.say("hello")
    with display.phase("RL", total=1) as phase:
        phase.advance(metrics())
    display.summary({"eval/after": 0.9}, tmp_path)
    assert capsys.readouterr().out == ""


def test_summary_names_the_folder_whole(tmp_path: Path) -> None:
    out = io.StringIO()
    display = Display(True, Console(file=out, width=40, highlight=False))
    display.summary(
        {"eval/after": 0.9, "mismatch/num_tokens": 123456, "weights_digest": "ab12", "wall_s": 12.5}, tmp_path
    )
    text = out.getvalue()
    assert "90.0%" in text and "123,456" in text and "ab12" in text and "12.5" in text
    assert f"Run folder: {tmp_path}\n" in text
