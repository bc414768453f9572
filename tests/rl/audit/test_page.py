"""The page in a real browser: quiet, self-contained, quick, usable without a mouse, and deaf to hostile words."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.audit import sounds
from rl.audit.compare import compare_runs
from rl.audit.records import Records, read
from rl.audit.replay.rescore import CheckedEpisode, CheckedStep, rescore
from rl.audit.report import audit, run_page
from rollout.heard import both_sides, user_sound
from rollout.record.episode import load_episodes
from rollout.turn.action import Action, Mode
from rollout.world.speech import SpeechBank
from tests.rl.audit.browser import Tab, chromium, tab
from tests.rl.audit.runs import SEEING, SPEAKING, first_file, flip, make, record, tamper
from tests.support.episodes import with_text

SIZES = {"phone": (390, 844), "laptop": (1280, 800), "wide": (1920, 1080)}
OPENS_IN_S = 2.0
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>{{script}}\u2028'\"&"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    program = chromium()
    assert program is not None
    with tab(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(made, tmp_path_factory.mktemp("audited") / "small"))
    audit(run)
    return run / "audit/report.html"


def quiet(browser: Tab) -> bool:
    assert browser.console() == []
    assert browser.requests() == []
    return True


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_opens_without_a_word_or_a_request(browser: Tab, page: Path, tmp_path: Path, size: str, scheme: str) -> None:
    browser.open(page, *SIZES[size], scheme)
    browser.settle()
    assert quiet(browser)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    assert "0 of" in browser.run("document.querySelector('h1').textContent")
    assert browser.run("document.querySelectorAll('.chart svg path').length") >= 8
    assert browser.run("document.querySelectorAll('.detail .grid svg image').length") == 1
    bright = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(bright) > 600) == (scheme == "light")
    assert len(browser.screenshot(tmp_path / f"{size}-{scheme}.png", whole=True)) > 50_000


def test_the_frames_that_were_seen(browser: Tab, tmp_path: Path) -> None:
    """A strip of them under the grid, and the chosen chunk's beside it, with the bytes that the episode has."""
    run = make(tmp_path, **SEEING)
    audit(run)
    browser.open(run / "audit/report.html")
    browser.settle()
    name = browser.run("document.querySelector('.detail h3').textContent").split(",")[0]
    stored = [e for path in sorted((run / "episodes").iterdir()) for e in load_episodes(path)]
    shown = dict(next(e for e in stored if e.name == name).frames.chunks())
    assert browser.run("document.querySelectorAll('.detail .grid svg image.pixels').length") == len(shown) > 10
    browser.run("document.querySelector('.lanes').focus()")
    for _ in range(9):
        browser.press("ArrowRight")
    pixels = browser.run(
        "(() => { const i = document.querySelector('.detail .frames img'), c = document.createElement('canvas');"
        "c.width = i.naturalWidth; c.height = i.naturalHeight; c.getContext('2d').drawImage(i, 0, 0);"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    levels = torch.tensor(pixels, dtype=torch.uint8).view(-1, 4)[:, :3]
    assert torch.equal(levels, shown[8].view(-1, 3)) and not torch.equal(levels, shown[0].view(-1, 3))
    assert "a frame" in browser.run("document.querySelector('.detail .readout').textContent")
    assert quiet(browser)


@pytest.fixture(scope="module")
def aloud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with a voice, with room for the sound of two of its eight episodes."""
    run = make(tmp_path_factory.mktemp("speaking"), **SPEAKING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sounds, "MOST_CHUNKS", 80)
        audit(run)
    return run / "audit/report.html"


AUDIO = "document.querySelector('.detail audio')"
BUTTON = "document.querySelector('.detail .player button')"
READOUT = "document.querySelector('.detail .readout')"


def chunk_read(browser: Tab) -> int:
    """The chunk at which the cursor is, by what is said of it; its rectangle is there, too."""
    found = int(browser.run(f"{READOUT}.textContent").split()[1].rstrip(","))
    assert browser.run("document.querySelector('.grid .pick').x.baseVal.value / (document.querySelector('.grid svg')"
                       ".clientWidth / 40)") == pytest.approx(found)  # fmt: skip
    return found


def test_both_sides_are_heard_and_the_cursor_runs_with_them(browser: Tab, aloud: Path, tmp_path: Path) -> None:
    browser.open(aloud)
    browser.settle()
    assert "Left the user, right the model" in browser.run("document.querySelector('.player').innerText")
    seconds = browser.run(f"new Promise(done => {{ const a = {AUDIO}; const go = () => done(a.duration);"
                          "if (a.readyState) go(); else a.addEventListener('loadedmetadata', go); })")  # fmt: skip
    assert seconds == pytest.approx(41 * 0.2 + 0.03), "a chunk more, for what is said in the last, and its end"
    seek = f"new Promise(done => {{ {AUDIO}.onseeked = done; {AUDIO}.currentTime = %s; }}).then(() => 0)"
    for time_s, chunk in ((3.3, 16), (0.1, 0), (7.99, 39), (8.2, 39)):
        browser.run(seek % time_s)
        assert chunk_read(browser) == chunk
    browser.run(seek % 1.0)
    browser.run(f"{BUTTON}.click()")
    browser.run(f"new Promise(done => {{ const wait = () => {AUDIO}.currentTime > 1.5 ? done(0) : setTimeout(wait, 20);"
                "wait(); })")  # fmt: skip
    assert browser.run(f"{BUTTON}.textContent") == "⏸ Pause"
    now = browser.run(f"(({BUTTON}.click()), {AUDIO}.currentTime)")
    browser.settle()
    assert 1.5 < now < 5 and abs(chunk_read(browser) - now * 5) <= 2
    assert browser.run(f"{AUDIO}.currentTime") == pytest.approx(now, abs=0.1), "it pauses"
    assert "Play" in browser.run(f"{BUTTON}.textContent")
    browser.run("document.querySelector('.lanes').focus()")
    browser.press("Home")
    assert browser.run(f"{AUDIO}.currentTime") == 0, "the cursor chooses where the sound goes on"
    browser.press("ArrowRight")
    assert browser.run(f"{AUDIO}.currentTime") == pytest.approx(0.2)
    assert quiet(browser)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.screenshot(tmp_path / "aloud.png", whole=True)


def test_both_sides_are_the_episodes(browser: Tab, aloud: Path) -> None:
    """As the browser decodes them, they are what `rollout.listen` writes, but for what MP3 loses."""
    browser.open(aloud)
    browser.settle()
    name = browser.run("document.querySelector('.detail h3').textContent").split(",")[0]
    records = read(aloud.parent.parent)
    assert records.scenarios is not None
    stored = [e for files in records.episodes.values() for path in files for e in load_episodes(path)]
    one, bank = next(e for e in stored if e.name == name), SpeechBank.open()
    sides = both_sides(one, lambda e: user_sound(e, records.scenarios, bank)).stereo.T
    decoded = browser.run(
        f"(async () => {{ const text = atob({AUDIO}.src.split(',')[1]),"
        "bytes = Uint8Array.from(text, c => c.charCodeAt(0)),"
        "sound = await new OfflineAudioContext(2, 1, 16000).decodeAudioData(bytes.buffer);"
        "return [0, 1].map(side => [...sound.getChannelData(side)]); })()"
    )
    heard = torch.tensor(decoded)
    assert heard.shape == sides.shape
    for side, other in ((0, 1), (1, 0)):
        lost = (heard[side] - sides[side]).square().mean() / sides[side].square().mean()
        assert lost < 0.05
        wrong = (heard[side] - sides[other]).square().mean() / sides[other].square().mean()
        assert wrong > 0.5, "the control: the other side"
        late = (heard[side, 8:] - sides[side, :-8]).square().mean() / sides[side].square().mean()
        assert late > 2 * lost, "the control: half a millisecond late"


def test_where_no_sound_is_the_page_says_so(browser: Tab, aloud: Path, page: Path) -> None:
    browser.open(aloud)
    browser.settle()
    show = "(() => {{ const e = document.querySelector('option[value=sound]').parentNode; e.value = '{}';" + (
        "e.dispatchEvent(new Event('change')); }})()"
    )
    for kind, rows in (("sound", 2), ("all", 8)):
        browser.run(show.format(kind))
        assert browser.run("document.querySelectorAll('table.rows tbody tr').length") == rows
    browser.run(f"{BUTTON}.click()")
    browser.run(f"window.before = {AUDIO}")
    browser.run("document.querySelectorAll('table.rows button')[5].click()")
    browser.settle()
    assert browser.run(f"{AUDIO} === null && {BUTTON} === null && before.paused"), "another episode ends the sound"
    assert "python -m rollout.listen renders it" in browser.run("document.querySelector('.detail').innerText")
    assert quiet(browser)
    browser.open(page)
    browser.settle()
    assert browser.run(f"{AUDIO} === null && {BUTTON} === null")
    assert "listen renders" not in browser.run("document.querySelector('.detail').innerText")
    with_sound, without = ('"sound":1' in path.read_text() for path in (aloud, page))
    assert with_sound and not without


def test_what_devtools_would_have_seen(browser: Tab, page: Path, tmp_path: Path) -> None:
    """The control: a page that complains and asks for something is caught; our own policy would have refused both."""
    loud = tmp_path / "loud.html"
    loud.write_text(
        "<!doctype html><html data-ready><script>console.error('oh'); fetch('http://127.0.0.1:9/').catch(() => 0)"
        "</script></html>"
    )
    browser.open(loud)
    browser.settle()
    assert any("oh" in line for line in browser.console()) and browser.requests() == ["http://127.0.0.1:9/"]
    text = page.read_text().replace(
        "</main>", "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/'></main>"
    )
    refused = tmp_path / "refused.html"
    refused.write_text(text)
    browser.open(refused)
    browser.settle()
    assert browser.run("window.hacked") is None and "Content Security Policy" in "".join(browser.console())


def test_search_filters_and_order(browser: Tab, page: Path) -> None:
    browser.open(page)
    browser.settle()
    rows = "[...document.querySelectorAll('table.rows tbody tr')].map(r => r.cells[0].textContent)"
    assert len(browser.run(rows)) == 8
    set_value = "const e = document.querySelector('{}'); e.value = '{}'; e.dispatchEvent(new Event('{}'))"
    browser.run("(() => {" + set_value.format(".search input", "turn_taking #1", "input") + "})()")
    found = browser.run(rows)
    assert found and all("turn_taking" in name and name.endswith("#1") for name in found)
    browser.run("(() => {" + set_value.format(".search input", "no such words", "input") + "})()")
    assert browser.run(rows) == [] and "0 of 8" in browser.run("document.querySelector('#episodes .hint').textContent")
    assert quiet(browser)


def test_usable_by_keyboard_and_screen_reader(browser: Tab, page: Path) -> None:
    browser.open(page)
    browser.settle()
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    browser.run("document.querySelector('.lanes').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.run("document.querySelector('.detail .readout').textContent").startswith("Chunk 2, 0.4 to 0.6 s")
    browser.run("document.querySelector('.plot[tabindex]').focus()")
    browser.press("Home")
    assert browser.run("document.querySelector('.chart .readout').textContent").startswith(
        "Step 0: log-probs that differ 0"
    )
    browser.run("document.querySelectorAll('table.rows button')[4].focus()")
    wanted = browser.run("document.activeElement.textContent")
    browser.run("document.activeElement.click()")
    browser.settle()
    assert browser.run("document.activeElement.textContent").startswith(wanted), "the episode's title has the focus"
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert {"main", "navigation", "banner", "contentinfo", "search", "table", "columnheader", "rowheader"} <= set(roles)
    assert roles.count("region") >= 4
    named = ("button", "link", "combobox", "searchbox", "table", "image")
    shown = [n for n in nodes if not n["ignored"] and n["role"]["value"] in named]
    assert len(shown) > 20 and [n["role"]["value"] for n in shown if not n.get("name", {}).get("value")] == []
    assert browser.run("[...document.querySelectorAll('[tabindex=\"0\"]')].every(e => e.ariaLabel)")


def test_the_theme_can_be_chosen(browser: Tab, page: Path) -> None:
    browser.open(page, scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    for _ in range(2):
        browser.run("document.getElementById('theme').click()")
    assert browser.run("document.getElementById('theme').textContent") == "Theme: dark"
    assert browser.run(colour) != light
    browser.open(page, scheme="light")
    assert browser.run("document.getElementById('theme').textContent") == "Theme: dark", "kept"
    browser.run("document.getElementById('theme').click()")


def test_words_names_and_recipes_are_only_text(browser: Tab, run: Path) -> None:
    def hostile(episode):  # type: ignore[no-untyped-def]
        actions = (Action(Mode.SPEAK, (HOSTILE,)), *episode.actions[1:])
        return replace(episode, scenario=f"{episode.family}/train/{HOSTILE}", actions=actions)

    tamper(first_file(run), hostile)
    recipe = (run / "config.yaml").read_text().replace("name: small", f"name: {json.dumps(HOSTILE)}")
    (run / "config.yaml").write_text(recipe)
    environment = json.loads((run / "environment.json").read_text()) | {"processor": HOSTILE}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "audit").mkdir()
    table = {"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "note": HOSTILE}
    (run / "audit/matrix.json").write_text(json.dumps({"tables": [table]}))
    assert audit(run).verdict == "not_comparable"
    assert "<script>window" not in (run / "audit/report.html").read_text()
    browser.open(run / "audit/report.html")
    browser.settle()
    assert quiet(browser)
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('img').length") == 0
    shown = browser.run("document.body.innerText")
    assert shown.count("</script><script>window.hacked=1</script>") >= 4


def test_a_difference_is_shown(browser: Tab, run: Path, tmp_path: Path) -> None:
    tamper(first_file(run), lambda e: with_text(e, logprob=flip(e.text.logprob, 5, 20)), which=[1])
    audit(run)
    browser.open(run / "audit/report.html")
    browser.settle()
    assert quiet(browser)
    assert browser.run("document.querySelector('#verdict').className") == "verdict different"
    assert browser.run("document.querySelectorAll('.grid .p-differs').length") == 1
    assert "1 log-prob and 0 whole rows" in browser.run("document.querySelector('.detail').innerText")
    assert "token differs" in browser.run("[...document.querySelectorAll('.detail td .bad')].map(e => e.textContent)")
    assert "record was changed" in browser.run("document.querySelector('#compared').innerText")
    browser.screenshot(tmp_path / "different.png", whole=True)


def test_a_comparison_opens(browser: Tab, run: Path, made: Path, tmp_path: Path) -> None:
    compare_runs(made, run, tmp_path / "out")
    browser.open(tmp_path / "out/report.html")
    browser.settle()
    assert quiet(browser)
    assert "One run, bit for bit" in browser.run("document.querySelector('h1').textContent")
    assert browser.run("document.getElementById('episodes').hidden")


def large(records: Records, steps: int, episodes: int) -> tuple[Records, list[CheckedStep]]:
    """As a long run would leave them: the audio of every scenario is another one, six rollouts share it."""
    metrics = [record(step, f"{step:032x}", 3000) for step in range(steps)]
    for one in metrics:
        one["reward/mean"] = (one["step"] * 7919 % 1000) / 250 - one["step"] / steps
    seen = [one for step in rescore(records) for one in step.episodes]
    generator, many = torch.Generator().manual_seed(0), []
    for i in range(episodes):
        source = seen[i % len(seen)]
        if i % 6 == 0:
            noise = torch.randint(-1, 2, source.episode.codes.shape, generator=generator)
        codes = (source.episode.codes.long() + noise).clamp(0, 15).to(torch.uint8)
        named = replace(source.episode, scenario=f"{source.episode.family}/train/{i // 6}", rollout=i % 6, codes=codes)
        many.append(CheckedEpisode(i // 48, named, None, source.logprob, source.digest))
    parts = [
        CheckedStep(step, [one for one in many if one.step == step], None)
        for step in sorted({one.step for one in many})
    ]
    return replace(records, metrics=metrics), parts


@pytest.mark.alone
def test_ten_thousand_steps_and_five_thousand_episodes_open_in_two_seconds(
    browser: Tab, made: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    records, parts = large(read(made), 10_000, 5_000)
    start = time.perf_counter()
    report, text = run_page(records, parts)
    built_s = time.perf_counter() - start
    assert (report.rescored.episodes, len(report.weights)) == (5_000, 10_000)
    path = tmp_path / "large.html"
    path.write_text(text)
    seconds = min(browser.open(path) for _ in range(3))
    browser.settle()
    record_property("page_mb", len(text) / 1e6)
    print(f"{len(text) / 1e6:.1f} MB, built in {built_s:.1f} s, opens in {seconds:.2f} s")
    assert quiet(browser)
    assert "of 5,000" in browser.run("document.querySelector('#episodes .pager').textContent")
    assert browser.run("document.querySelectorAll('.detail .grid svg image').length") == 1
    assert seconds <= OPENS_IN_S
