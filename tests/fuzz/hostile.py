"""Hostile content of files, made from a good file: what crashes, editors, other programs and attackers leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from kernels.errors import MetronomeError

VALUES = (
    "null", "true", "-1", "0", "1.0", "0.5", "1e999", "-1e999", "NaN", "Infinity", "10000000000000000000",
    "1" + "0" * 400, "9223372036854775807", "-9223372036854775808", '""', '"\\ud800"', '"\\u0000"', '"\\u001b[2J\\n"',
    '"\\u2028"', '"../../etc/passwd"', '"/dev/zero"', '"no"', '"1"', "[]", "{}", "[null]", "[[]]", '{"": null}',
    '{"a": 1, "a": 2}', "[" * 70 + "]" * 70, "[" * 5000, '"' + "x" * 5000 + '"',
)  # fmt: skip
"""JSON, or nearly, in place of any value."""

FILES = (
    b"", b"\n", b"\0" * 4096, b"[]", b"{}", b"null", b"3", b'"a"', b"{", b"[" * 100_000, b"\xff\xfe{\0}\0",
    b"\xfe\xff\0{\0}", b"\xef\xbb\xbf", b"caf\xe9", b'{"a": "\xed\xa0\x80"}', b'{"a": 1, "a": 2}', b"a: &a [*a]",
    b"a: &a [*a, *a]\n", b"1: 2", b"\x1b[2J", "\u2028{}".encode(), b"\x80\x04K\x01.",
    b"!!python/object/apply:os.system [a]",
)  # fmt: skip
"""In place of any file."""


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value within a JSON value, its own first."""
    yield at
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(inner, (*at, name))


def with_value(value: Any, at: tuple[str | int, ...], text: str) -> str:
    """The JSON text of ``value`` with ``text`` in one place."""
    if not at:
        return text
    copy = json.loads(json.dumps(value))
    holder = copy
    for name in at[:-1]:
        holder = holder[name]
    holder[at[-1]] = "\N{BULLET}"
    return json.dumps(copy).replace(json.dumps("\N{BULLET}"), text)


@st.composite
def json_text(draw: st.DrawFn, good: str) -> str:
    """A JSON text with one value replaced, left out or under another name."""
    value = json.loads(good)
    at = draw(st.sampled_from(list(places(value))))
    text = draw(st.sampled_from(VALUES))
    if at and isinstance(at[-1], str) and draw(st.integers(0, 4)) == 0:
        copy = json.loads(good)
        holder = copy
        for name in at[:-1]:
            holder = holder[name]
        moved = holder.pop(at[-1])
        if draw(st.booleans()):
            holder[draw(st.sampled_from(("__class__", "to_dict", "é\u2028", "", "\x07", "step")))] = moved
        return json.dumps(copy)
    return with_value(value, at, text)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes cut short, with others put in, or with a bit flipped."""
    at = draw(st.integers(0, len(good)))
    match draw(st.integers(0, 2)):
        case 0:
            return good[:at]
        case 1:
            put = draw(
                st.sampled_from((b"\xe9", b"\0", b"\n", b"\xe2\x80\xa8", b"\r\n", b"[", b"}", b'"', b"\xed\xa0\x80"))
            )
            return good[:at] + put + good[at:]
        case _:
            spoiled = bytearray(good or b"\0")
            spoiled[min(at, len(spoiled) - 1)] ^= 1 << draw(st.integers(0, 7))
            return bytes(spoiled)


@st.composite
def _in_a_line(draw: st.DrawFn, good: bytes) -> bytes:
    lines = good.decode().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = draw(json_text(lines[place]))
    return ("\n".join(lines) + draw(st.sampled_from(("\n", "")))).encode("utf-8", "surrogatepass")


@st.composite
def _in_the_header(draw: st.DrawFn, good: bytes) -> bytes:
    size = int.from_bytes(good[:8], "little")
    header, rest = good[8 : 8 + size], good[8 + size :]
    told = json.loads(header)
    inner = told.get("__metadata__", {}).get("episodes")
    if inner and draw(st.integers(0, 3)):
        told["__metadata__"]["episodes"] = draw(json_text(inner))
        header = json.dumps(told).encode()
    else:
        header = draw(json_text(header.decode())).encode("utf-8", "surrogatepass")
    lie = draw(st.sampled_from((0, 0, 0, 1, -1, 2**40)))
    return max(0, len(header) + lie).to_bytes(8, "little") + header + rest


def contents(good: bytes, form: str) -> st.SearchStrategy[bytes]:
    """Hostile contents of a file of the ``form`` json, lines, safetensors or bytes, of which nothing is known."""
    inside: Callable[[bytes], st.SearchStrategy[bytes]] = {
        "json": lambda data: json_text(data.decode()).map(lambda text: text.encode("utf-8", "surrogatepass")),
        "lines": _in_a_line,
        "safetensors": _in_the_header,
        "bytes": damaged,
    }[form]
    return st.one_of(inside(good), inside(good), inside(good), damaged(good), st.sampled_from(FILES))


def refusal(act: Callable[[], object]) -> str | None:
    """The one line with which ``act`` refuses what it reads, None if it works. Whatever else is raised is a fault."""
    try:
        act()
    except MetronomeError as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1 and len(text) < 20_000, text
        assert not any("\ud800" <= c <= "\udfff" or c < " " for c in text), text
        return text
    return None
