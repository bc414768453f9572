"""``python -m kernels.gpu_report FILE``: the table of `kernels/docs/gpu.md`, of a report that `.ci/gpu` wrote.

`.ci/gpu` makes the report by ``--collect FOLDER``: it joins what its parts wrote there, judges it, prints one table
and ends with status 1 when a bit differs or a part failed. A part that was left out for lack of time, or that left
nothing to judge, is named; nothing is taken for granted.

This module reads files only; it knows nothing of ops or models.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("kernels.gpu_report")

import statistics
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import check_file
from model.program.reading import UnreadableError, read_json, read_json_lines, read_text

SCHEMA = "metronome.gpu/1"

PORTABLE = (
    "recordings",
    "noises, train",
    "noises, held_out",
    "user's audio",
    "demonstrated actions",
    "dMel codes",
    "fresh weights",
)
"""Stages of `rl.fingerprint` that no device and no backend decides."""

UNFINISHED = ("left out", "out of time")
"""States of a part for which there was no time; no failures."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line of the table. ``ok`` None: a figure that nothing is required of, or something that is missing."""

    part: str
    ok: bool | None
    text: str


# ---- joining what the parts wrote ----


def collect(folder: Path, golden: Path | None) -> Report:
    """What lies in ``folder``: parts.jsonl, one JSON file a part, tests.xml. ``golden``: a CPU's fingerprint."""
    file = folder / "parts.jsonl"
    parts = [part for _, part in read_json_lines(file)] if file.is_file() else []
    report: Report = {"schema": SCHEMA, "parts": parts, "card": _text(folder / "card.csv").strip()}
    for name in ("machine", "variants", "quickstart", "audit", "again", "resumed", "crossing", "fingerprint", "longer"):
        report[name] = _json(folder / f"{name}.json")
    report["rows"], report["controls"] = {}, {}
    for path in sorted(folder.glob("rows_*.json")):
        found = _json(path) or {}
        report["rows"] |= found.get("rows", {})
        report["controls"] |= found.get("controls", {})
    for name in ("latency", "graph", "bench"):
        report[name] = (_json(folder / f"{name}.json") or {}).get(name, [])
    report["tests"] = _tests(folder / "tests.xml")
    report["golden"] = None if golden is None else _json(golden)
    report["findings"] = [asdict(f) for f in findings(report)]
    return report


def _text(path: Path) -> str:
    return read_text(path) if path.is_file() else ""


def _json(path: Path) -> Any:
    """None for a file that is not there or that its part could not finish."""
    try:
        return read_json(path)
    except UnreadableError:
        return None


def _tests(path: Path) -> dict[str, Any] | None:
    """Counts and names of failures from pytest's XML."""
    if not _text(path):
        return None
    suites = list(xml.parse(path).getroot().iter("testsuite"))
    counts = {n: sum(int(s.get(n, 0)) for s in suites) for n in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"failed": failed}


# ---- judging it ----


def findings(report: Report) -> Iterator[Finding]:
    """Every line of the table, the most valuable first."""
    for part in report["parts"]:
        if part["status"] in UNFINISHED:
            yield Finding(f"part {part['name']}", None, f"{part['status']} after {part['seconds']} s")
        elif part["status"] != 0:
            text = f"status {part['status']} after {part['seconds']} s; see its log"
            yield Finding(f"part {part['name']}", False, text)
    yield from _rows(report)
    yield from _digests(report)
    if report["fingerprint"] and report["golden"]:
        ours, cpu = report["fingerprint"]["stages"], report["golden"]["stages"]
        differing = [name for name in PORTABLE if ours.get(name) != cpu.get(name)]
        text = (
            f"differs from the CPU's in {', '.join(differing)}" if differing else f"the CPU's in {len(PORTABLE)} stages"
        )
        yield Finding("portable stages", not differing, text)
    if (tests := report["tests"]) is not None:
        bad = tests["failures"] + tests["errors"]
        passed = tests["tests"] - bad - tests["skipped"]
        text = f"{passed} passed, {bad} failed, {tests['skipped']} skipped {' '.join(tests['failed'][:3])}"
        yield Finding("tests of the ops", not bad and passed > 0, text.strip())
    for one in report["latency"]:
        bits = f"{one['unequal']} of {one['tokens']:,} tokens unequal"
        waits = f"{sum(one['waits'].values())} waits of the host in {one['forwards']} forwards"
        text = f"{one['tick_ms']:.1f} ms, {waits}, learner {one['learn_ms']:.0f} ms, {bits}"
        yield Finding(f"micro-turn, {_case(one)}", one["unequal"] == 0, text)
    for one in report["graph"]:
        text = f"{one['graph_ms']:.2f} ms as a graph, {one['engine_ms']:.1f} ms as it is, bits "
        yield Finding(f"decode step, {_case(one)}", None, text + ("equal" if one["same_bits"] else "differ"))
    for family, ratios in _ratios(report["bench"]).items():
        text = f"median {statistics.median(ratios):.2f}, worst {max(ratios):.2f} times torch's device time"
        yield Finding(f"op {family}", None, text)


def _rows(report: Report) -> Iterator[Finding]:
    rows, controls = report["rows"], report["controls"]
    if rows:
        bad = [name for name, found in rows.items() if found]
        yield Finding(
            "row contract", not bad, f"{len(rows) - len(bad)} of {len(rows)} hold {'; '.join(bad[:3])}".strip()
        )
    if controls:
        missed = [name for name, found in controls.items() if not found]
        text = f"{len(controls) - len(missed)} of {len(controls)} caught {'; '.join(missed[:3])}".strip()
        yield Finding("its controls", not missed, text)
    if rows and not controls:
        yield Finding("its controls", False, "none was run, so that the row contract's check proves nothing")
    if variants := report["variants"]:
        if variants["shipped"]:
            bad = [name for name, found in variants["shipped"].items() if found]
            text = f"differs from itself: {bad}" if bad else "equal for every row count"
            yield Finding("shipped product", not bad, text)
        for name, tiles in variants["variants"].items():
            equal = sum(tile.get("same_bits", False) for tile in tiles.values())
            yield Finding(f"other tiles, {name}", None, f"{equal} of {len(tiles)} give the shipped bits")


def _digests(report: Report) -> Iterator[Finding]:
    run = report["quickstart"]
    if not run:
        return
    unequal, tokens, digest = run["mismatch/num_unequal"], run["mismatch/num_tokens"], run["weights_digest"]
    yield Finding("quickstart", unequal == 0 and tokens > 0, f"{unequal} of {tokens:,} tokens unequal, digest {digest}")
    if report["audit"]:
        yield Finding("audit", report["audit"]["verdict"] == "identical", report["audit"]["headline"])
    same = {"again": "the same recipe again", "resumed": "resumed from its middle", "crossing": "read back on the CPU"}
    for name, title in same.items():
        if other := report[name]:
            text = "the same digest" if other["weights_digest"] == digest else f"digest {other['weights_digest']}"
            yield Finding(title, other["weights_digest"] == digest, text)
    if longer := report["longer"]:
        unequal, tokens = longer["mismatch/num_unequal"], longer["mismatch/num_tokens"]
        yield Finding("longer quickstart", unequal == 0, f"{unequal} of {tokens:,} tokens unequal")


def _case(one: dict[str, Any]) -> str:
    return f"{one['preset']} {one['dtype']}, {one['sessions']} session{'s' * (one['sessions'] > 1)}"


def _ratios(bench: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Ours over torch, device times, by op, direction and number format."""
    found: dict[str, list[float]] = {}
    for one in bench:
        words = [one["op"], *(word for word in ("backward", "bf16", "fp32") if word in one["what"])]
        found.setdefault(" ".join(words), []).append(one["ratio"])
    return found


def failed(report: Report) -> list[str]:
    """Parts that failed, and whatever differed. A report in which nothing was compared has failed too."""
    bad = [f["part"] for f in report["findings"] if f["ok"] is False]
    return bad if any(f["ok"] for f in report["findings"]) else [*bad, "nothing was compared"]


def table(report: Report) -> str:
    mark = {True: "ok  ", False: "FAIL", None: "    "}
    width = max(len(f["part"]) for f in report["findings"]) if report["findings"] else 0
    return "\n".join(f"{mark[f['ok']]} {f['part']:{width}s}  {f['text']}" for f in report["findings"])


# ---- the document's rows ----


def readme(report: Report) -> str:
    """A markdown table: the machine, what was equal, and how fast."""
    machine = report["machine"] or {}
    versions = machine.get("packages", {})
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name))
    rows = [("", report["card"] or machine.get("gpu") or "unknown card"), ("Versions", named)]
    rows.append(("Contract", f"`{machine.get('contract_id', 'unknown')}`"))
    for finding in report["findings"]:
        if not finding["part"].startswith("other tiles"):
            failed_mark = "**FAILED** " if finding["ok"] is False else ""
            rows.append((finding["part"][0].upper() + finding["part"][1:], failed_mark + finding["text"]))
    head, *rest = [f"| {name} | {text.replace('|', '/')} |" for name, text in rows]
    return "\n".join([head, "| --- | --- |", *rest])


def parser() -> Parser:
    parser = Parser("kernels.gpu_report", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the report")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="make FILE of what the parts wrote to FOLDER")
    parser.add_argument("--golden", type=Path, metavar="JSON", help="with --collect: a CPU's fingerprint")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    read = given.file if given.collect is None else given.collect
    if given.collect is not None:
        check_file("FILE", given.file)
    try:
        if given.collect is None:
            print(readme(read_json(given.file)))
            return
        report = collect(given.collect, given.golden)
    except (ValueError, LookupError, TypeError, AttributeError, xml.ParseError) as error:
        raise MetronomeError(f"{read}: cannot be read as a report of .ci/gpu ({error!r:.300})") from error
    write_json(given.file, report, indent=1)
    print(table(report))
    if bad := failed(report):
        print(f"FAILED: {', '.join(bad)}")
        sys.exit(1)
    print("all that was compared is equal")
