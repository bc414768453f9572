"""Audits a run and writes the two files of the result: report.json for programs, report.html for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.program.files import write_json, write_whole
from model.program.reading import one_line
from model.program.recipe import flat
from rl.audit import pictures
from rl.audit.document import Report, RunReport, plain
from rl.audit.episodes import browser, words_of
from rl.audit.page import named, render
from rl.audit.records import Records, read
from rl.audit.replay.rescore import CheckedStep, rescore
from rl.audit.sounds import Sounds
from rl.audit.table import Table
from rl.audit.verdict import run_report


def audit(run: Path, at_most: int | None = None) -> RunReport:
    """Re-scores the run's saved episodes, at most ``at_most`` of them; writes RUN/audit/report.html and report.json and
    returns the latter's content. Raises MetronomeError when ``run`` is not a run's folder."""
    records = read(run)
    steps = list(rescore(records, at_most))
    report, page = run_page(records, steps)
    write(run / "audit", report, page)
    return report


def run_page(records: Records, steps: Sequence[CheckedStep]) -> tuple[RunReport, str]:
    """(the report, the HTML page) of a run with its re-scored steps."""
    episodes = [one for checked in steps for one in checked.episodes]
    folder = records.path / "audit"
    tables = pictures.tables(folder / "difference.json", records.gaps) if records.stopped else []
    tables += next((p.diagnosis.tables() for p in steps if p.diagnosis), [])
    tables += pictures.tables(folder / "matrix.json", records.gaps)
    shown = browser(episodes, records.scenarios, words_of(records), Sounds(records))
    if shown["omitted"]:
        records.gaps.append(f"The page leaves out {shown['omitted']:,} of {len(episodes):,} episodes, to stay small.")
    report = run_report(records, steps)
    data = {
        "steps": [record["step"] for record in records.metrics],
        "charts": pictures.curves(records, [p.step for p in steps if p.mismatch.num_tokens]),
        "scatter": pictures.scatter(episodes),
        "episodes": shown["rows"],
        "tables": plain(tables),
        "machines": [plain(machines({"Value": records.environment}))],
        "recipes": [["Recipe", records.recipe_text]],
    }
    return report, render(report, data, shown["blocks"])


def machines(environments: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with a column for each run's environment.json; ``environments``: heading -> content."""
    columns = [dict(flat(one)) for one in environments.values()]
    fields = list(dict.fromkeys(name for one in columns for name in one))
    rows = [[name, *(_value(one[name]) if name in one else "(absent)" for one in columns)] for name in fields]
    return Table("Environment", ["Field", *environments], rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write(folder: Path, report: Report, page: str) -> None:
    """Writes report.html and report.json."""
    write_whole(folder / "report.html", page.encode())
    write_json(folder / "report.json", plain(report))


def statement(report: Report, folder: Path) -> str:
    """The report's verdict, scope and path, as lines for a terminal. What a run's files say cannot add a line to them,
    nor control the terminal."""
    name, headline = named(report).lower(), report.headline
    said = headline.lower().startswith(name)  # "Not comparable. …", "Nothing compared: …"
    lines = [f"Audit: {name}{headline[len(name) :] if said else f'. {headline}'}", report.scope]
    if report.gaps:
        lines.append(f"What could not be compared, and other gaps: {len(report.gaps)}, listed in the report.")
    return "\n".join(map(one_line, [*lines, f"Audit report: {(folder / 'report.html').resolve()}"]))
