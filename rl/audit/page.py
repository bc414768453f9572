"""One self-contained HTML file: template, style and script from this folder, and the data inside it.

What comes from a run (words, names, recipes) is not trusted: Python escapes what it puts into HTML, the data is JSON
with ``<`` written as ``\\u003c``, and the script sets text only, never HTML. A content security policy with the hashes
of this style and this script makes the browser refuse any other, and every request."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.program.reading import read_text
from rl.audit.document import Report, partial, plain

FOLDER = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "sound.js", "grid.js", "episodes.js", "page.js")


def render(report: Report, data: Mapping[str, Any], blocks: Sequence[str] = ()) -> str:
    """The page as HTML. ``data``: what the script draws beside the report; ``blocks``: those of `episodes.browser`."""
    style = read_text(FOLDER / "page.css")
    body = "\n".join(read_text(FOLDER / name) for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{body}}})();\n'
    name = named(report)
    title = f"{name} · {report.title} · Metronome audit"
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "title": html.escape(title),
        "policy": html.escape(policy),
        "style": style,
        "verdict": html.escape(f"{report.verdict} partial" if partial(report) else report.verdict),
        "name": html.escape(name),
        "subject": html.escape(report.title),
        "headline": html.escape(report.headline).replace("full-vocabulary", "<span>full-vocabulary</span>"),
        "scope": html.escape(report.scope),
        "data": _json({"report": plain(report), **data}),
        "blocks": "\n".join(f'<script type="text/plain" id="block-{i}">{b}</script>' for i, b in enumerate(blocks)),
        "script": script,
    }
    # In one pass, so that nothing inside a part is taken for a place.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], read_text(FOLDER / "page.html"))


def named(report: Report) -> str:
    """The verdict, for a badge or the begin of a sentence."""
    return "Equal as far as both go" if partial(report) else report.verdict.words.capitalize()


def _json(value: Any) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
