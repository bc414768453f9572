"""What a text in a recipe is, how recipes are merged, and what is no recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.errors import MetronomeError
from model.program.reading import parse_yaml
from model.program.recipe import read_recipe
from model.program.yaml_text import to_yaml
from reward.train import RewardTrainConfig
from rl.train import parse


@pytest.mark.parametrize("word", ["no", "007", "1e5", "true", "null", "~", "1.0", "0x1f", "1_000", "on", "2024-01-01"])
def test_a_word_in_quotes_stays_a_word(word: str) -> None:
    text = f"trainer: {{save_strategy: '{word}', deep: ['{word}', {{x: '{word}'}}]}}"
    read = read_recipe("reward.train", "", RewardTrainConfig, ["--config", f"{text}\n"])
    assert read.config.trainer == {"save_strategy": word, "deep": [word, {"x": word}]}
    again = read_recipe("reward.train", "", RewardTrainConfig, ["--config", read.text])
    assert again == read


def test_save_strategy_no_on_the_command_line() -> None:
    given = ["--trainer.save_strategy", "no", "--trainer.save_steps", "5", "--trainer.bf16", "false"]
    trainer = read_recipe("reward.train", "", RewardTrainConfig, given).config.trainer
    assert trainer == {"save_strategy": "no", "save_steps": 5, "bf16": False}


@pytest.mark.parametrize("name", ["1e5", "true", "null", "007", "no", "1.5"])
def test_a_name_like_another_value_is_a_name(name: str) -> None:
    config, _, text = parse(["--name", name])
    assert config.name == name
    assert parse(["--config", text])[::2] == (config, text)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(), st.lists, max_leaves=6))
def test_what_is_written_is_read_back(value: Any) -> None:
    assert parse_yaml(to_yaml({"a": value})) == {"a": value}


def test_defaults_of_a_part_that_is_given_in_part_stay() -> None:
    """The warm start's optimizer has other defaults than the class."""
    config, _, _ = parse(["--warmstart.optim.beta1", "0.5", "--config", "{warmstart: {optim: {beta2: 0.5}}}"])
    optim = config.warmstart.optim
    assert (optim.beta1, optim.beta2, optim.lr, optim.clip_norm) == (0.5, 0.5, 3e-3, 1.0)


def test_later_ones_count_and_mappings_are_merged(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("rl: {steps: 1, groups: 3}\nscenarios: {families: [timespeak], timespeak: {chunks: 40}}\n")
    two.write_text("rl: {steps: 2}\n")
    config, resume, _ = parse(
        ["--config", str(one), "--rl.gamma=0.5", "--rl.gamma", "0.6", "--config", str(two), "--resume"]
    )
    assert (config.rl.steps, config.rl.groups, config.rl.gamma, resume) == (2, 3, 0.6, True)
    assert config.scenarios.families == ("timespeak",) and config.scenarios.settings_of("timespeak").chunks == 40


LAUGHS = b"a: &a [1, 1]\n" + b"".join(b"%c: &%c [%s*a]\n" % (c, c, b"*%c, " % (c - 1) * 9) for c in range(98, 106))
"""Nine times as many values in each line as in the one before."""


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"x: &a\n  b: *a\n", "refers to itself"),
        (b"rl: {" * 5000, "nested deeper"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 106)),
            "more than 100,000 values",
        ),
        (b"rl: {steps: 1, steps: 2}\n", "'steps' comes twice"),
        (b"name: M\xfcller\n", "Latin-1"),
        (b"\x00\x01\x02\xff", "null characters"),
        (b"\xff\xfen\x00a\x00", "UTF-16"),
        (b"[1, 2]\n", "must have fields"),
        (b"name: " + b"x" * (1 << 19), "at most 262,144 are read"),
        (b"1: 2\n", ""),
        (b"rl:\n", "rl is None: give a mapping of fields"),
        (b"rl: !!python/object/apply:os.system [exit]\n", "python"),
    ],
    ids=["itself", "deep", "laughs", "twice", "latin1", "binary", "utf16", "list", "long", "key", "null", "python"],
)
def test_a_recipe_that_is_none(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(MetronomeError) as error:
        parse(["--config", str(path)])
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1500


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "no.yaml", "is missing"),
        (Path("/dev/zero"), "no regular"),
    ):
        with pytest.raises(MetronomeError, match=says):
            parse(["--config", str(path)])
    for arguments, says in (
        (["steps"], "is no option"),
        (["--rl.steps"], "has no value"),
        (["--rl.step", "3"], "no field 'step'"),
    ):
        with pytest.raises(MetronomeError, match=says):
            parse(arguments)
    if os.getuid():
        (tmp_path / "closed.yaml").touch(0)
        with pytest.raises(MetronomeError, match="cannot be read"):
            parse(["--config", str(tmp_path / "closed.yaml")])


def test_help_lists_fields_with_ranges_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for line in (
        "--rl.steps  a whole number, 0 to 10,000,000; default 120",
        "--warmstart.optim.lr  a number, 0.0 to 1.0; default 0.003",
        "--scenarios.timespeak.chunks  a whole number, 1 to 3,000; default 60",
        "--model.checkpoint  text, 1 to 4,096 characters, or null; default null",
    ):
        assert line in text
