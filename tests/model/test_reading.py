"""Text, JSON, JSON lines and YAML as other programs, editors, crashes and attackers write them: the right value, or one
line that names the place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from kernels.errors import MetronomeError
from model.program import reading
from model.program.ranges import Range
from model.program.reading import (
    MOST_RECIPE_BYTES,
    UnreadableError,
    as_record,
    one_line,
    parse_json,
    parse_yaml,
    read_json_lines,
    read_text,
    read_yaml,
)


@dataclass(frozen=True)
class Inner:
    name: str
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    step: Annotated[int, Range(0, 1000)]
    share: float
    inner: Inner | None = None
    flag: bool = False


def refusal(act: Any, *arguments: Any) -> str:
    """The one line of the error that ``act`` raises."""
    with pytest.raises(UnreadableError) as error:
        act(*arguments)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and len(text) < 700 and text.isprintable()
    assert isinstance(error.value, MetronomeError)
    return text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfcaf\xc3\xa9", "café"),
        (b"caf\xc3\xa9\r\n", "café\r\n"),
        ("a\u2028b\u0085c".encode(), "a\u2028b\u0085c"),
        (b"", ""),
    ],
)
def test_text_is_utf8(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "a").write_bytes(data)
    assert read_text(tmp_path / "a") == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("café".encode("utf-16"), r"is UTF-16; save it as UTF-8"),
        (b"\xfe\xff\0a", r"is UTF-16;"),
        ("a".encode("utf-32"), r"is UTF-32;"),
        (b"\0\0\xfe\xff\0\0\0a", r"is UTF-32;"),
        ("a".encode("utf-16-le"), r"null characters"),
        (b"\0" * 4096, r"null characters"),
        (b"ab\ncaf\xe9", r"is not UTF-8 (byte 0xe9 in line 2; Latin-1?)"),
        (b"caf\xe9", r"is not UTF-8 (byte 0xe9; Latin-1?)"),
        (b'"\xed\xa0\x80"', r"is not UTF-8 (byte 0xed"),  # half of a surrogate pair
    ],
)
def test_other_encodings_are_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "a").write_bytes(data)
    assert f"{tmp_path / 'a'}: " in refusal(read_text, tmp_path / "a")
    assert says in refusal(read_text, tmp_path / "a")
    if b"\n" not in data:
        assert says in refusal(lambda: list(read_json_lines(tmp_path / "a")))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path, says in (
        (tmp_path / "nowhere", "is missing"),
        (tmp_path / "file/below", "cannot be read (Not a directory)"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("a" * 300), "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / "two\nlines", "is missing"),
        (tmp_path / "half\ud800", "cannot be read"),
    ):
        assert says in refusal(reading.read_bytes, path)
    (tmp_path / "file").write_text("12345")
    assert "5 bytes; at most 4" in refusal(read_text, tmp_path / "file", 4)
    assert read_text(tmp_path / "file", 5) == "12345"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1,]", "is not JSON"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' comes twice"),
        ("NaN", "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ("1e999", "the number 1e999 is too large"),
        ("1" + "0" * 400, "has more than 64 bits"),
        ("1" + "0" * 5000, "has more than 64 bits"),  # more digits than Python's int takes
        (str(2**63), "has more than 64 bits"),
        (str(-(2**63) - 1), "has more than 64 bits"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"a": {"\udc00\ud800": 1}}', "half of a surrogate pair"),
        ('"\ud800"', "half of a surrogate pair"),
        ('"a\nb"', "is not JSON (Invalid control character"),
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("[" * 100_000, "deeper than 64"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "deeper than 64"),
    ],
)
def test_json_that_is_refused(text: str, says: str) -> None:
    assert says in refusal(parse_json, text)


@pytest.mark.parametrize("value", [0, -(2**63), 2**63 - 1, 1.5, 1e308, "\u2028", "😀", None, True, [], {}, {"a": [{}]}])
def test_json_that_is_taken(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value
    assert parse_json("[" * 61 + json.dumps(value) + "]" * 61) is not None


def test_many_keys_twice_take_no_time() -> None:
    """(Quadratic once.)"""
    text = "{" + ",".join(f'"k{i}": 1' for i in range(100_000))
    assert "'k99999' comes twice" in refusal(parse_json, text + ',"k99999": 2}')


def test_lines_end_with_a_line_feed_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\u0085z\x7f"}\r\n\n  \r\n{"a": 2}'.encode())
    assert list(read_json_lines(path)) == [(1, {"a": "x\u2028y\u0085z\x7f"}), (4, {"a": 2})]
    for bad in ("[]", "null", '{"a": 1', '{"a": 1} {"a": 2}', '{"a": NaN}'):
        path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 3}}\n')
        assert f"{path}, line 2: " in refusal(lambda: list(read_json_lines(path)))


def test_half_a_last_line_is_cut_away() -> None:
    assert reading.whole_lines(b"a\nb\nhal") == b"a\nb\n"
    assert reading.whole_lines(b"a\nb\n") == b"a\nb\n"
    assert reading.whole_lines(b"hal") == b""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "its content: "),
        ("null", "its content: "),
        ('{"share": 1.0}', "step: "),
        ('{"step": null, "share": 1.0}', "step: "),
        ('{"step": 1.0, "share": 1.0}', "step: "),
        ('{"step": true, "share": 1.0}', "step: "),
        ('{"step": "1", "share": 1.0}', "step: "),
        ('{"step": -1, "share": 1.0}', "step is -1: give a number from 0 to 1,000"),
        ('{"step": 1, "share": true}', "share: "),
        ('{"step": 1, "share": 1.0, "flag": 1}', "flag: "),
        ('{"step": 1, "share": 1.0, "inner": []}', "inner"),
        ('{"step": 1, "share": 1.0, "inner": {"name": 3}}', "inner"),
        ('{"step": 1, "share": 1.0, "inner": {"name": "a", "at": [1, null]}}', "at.1"),
        ('{"step": 1, "share": 1.0, "inner": {"name": "a\\u0007"}}', "control character"),
    ],
)
def test_records_are_of_their_types(text: str, says: str) -> None:
    assert says in refusal(as_record, text, Outer, "file")


def test_control_records_that_are_right() -> None:
    text = '{"step": 7, "share": 1, "inner": {"name": "a", "at": [1, 2]}, "new": 3}'
    assert as_record(text, Outer) == Outer(7, 1.0, Inner("a", (1, 2)))
    assert as_record('{"a": 1, "b": 2.5}', dict[str, float]) == {"a": 1.0, "b": 2.5}
    assert "two\\nlines" in refusal(as_record, '{"two\\nlines": "x"}', dict[str, float])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: no\nb: off\nc: yes", {"a": "no", "b": "off", "c": "yes"}),
        ("[true, null, ~, 1, 1e-3, .5, 0x10, 1_000, 12:30, 2020-01-01]",
         [True, None, None, 1, 0.001, 0.5, "0x10", "1_000", "12:30", "2020-01-01"]),
        ("a: &x {d: 1}\nb: *x", {"a": {"d": 1}, "b": {"d": 1}}),
        ("a: 'no'\n'1': 2", {"a": "no", "1": 2}),
        ("", None),
    ],
)  # fmt: skip
def test_yaml_that_is_taken(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


BOMB = "\n".join([f"a0: &a0 {{{', '.join(f'k{i}: 1' for i in range(9))}}}"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)])  # fmt: skip
MERGES = "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [*a]", "refers to itself"),
        ("a: &a {b: *a}", "refers to itself"),
        ("[" * 3000, "deeper than 64"),
        (BOMB, "more than 100,000 values"),
        (MERGES, "more than 100,000 values"),
        ("a: 1\nb: 2\na: 3", "the key 'a' comes twice"),
        ("1: 2", "the key 1 is no text"),
        ("? [1]\n: 2", "is not YAML"),
        ("a: !!bool x", "is not YAML that can be used"),
        ("a: !!int x", "is not YAML"),
        ("a: !!float [1]", "is not YAML"),
        ("a: !!timestamp 2020-99-99", "is not YAML"),
        ("a: !!timestamp 2020-01-01", "a date, which is no value of JSON"),
        ("a: !!binary aGk=", "a bytes, which is no value of JSON"),
        ("!!set {a}", "a set, which is no value of JSON"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
        ("a: \x07", "is not YAML"),
        ("a: [", "is not YAML"),
        ("a: *nowhere", "is not YAML"),
        (r'a: "\ud800"', "half of a surrogate pair"),
        ("1" * 5000, "too large"),
    ],
)
def test_yaml_that_is_refused(text: str, says: str) -> None:
    assert says in refusal(parse_yaml, text, "recipe.yaml")


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"a": "é\u2028"}'.encode())
    program = (
        "import locale, pathlib, sys\n"
        "from model.program.reading import read_json\n"
        "print(locale.getpreferredencoding(False), ascii(read_json(pathlib.Path(sys.argv[1]))))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path / "a.json")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split(maxsplit=1)[0] != "UTF-8", "the control: this locale is another"
    assert output.split(maxsplit=1)[1].strip() == r"{'a': '\xe9\u2028'}"


def test_a_long_yaml_text_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    longest = "a: " + "x" * (MOST_RECIPE_BYTES - 3)
    assert parse_yaml(longest)["a"].startswith("xxx")
    for text in (longest + "x", longest[:-1] + "é"):
        with pytest.raises(UnreadableError, match=f"at most {MOST_RECIPE_BYTES:,} are read"):
            parse_yaml(text)
    (tmp_path / "f").write_text(longest + "x")
    with pytest.raises(UnreadableError, match=r"f: has .* bytes; at most"):
        read_yaml(tmp_path / "f")


@pytest.mark.parametrize("text", ["a\nb", "\x1b[8m", "\u202eabc", "\u2028", "\u200b", "\x9b", "\ud800", "\U000e0001"])
def test_what_is_not_printable_is_escaped(text: str) -> None:
    assert one_line(text).isprintable() and one_line(text) != text
    assert one_line("«café» 四 …") == "«café» 四 …", "the control"
