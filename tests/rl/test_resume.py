"""A run goes on with `--resume` to the bits of the uninterrupted one, however it was moved and its recipe spelled; what
decides bits must be equal, and what differs is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels.errors import MetronomeError
from model.program.recipe import flat
from rl.audit.report import audit
from rl.folder import RunFolder, notes
from rl.resume import (
    CHECKED,
    FREE,
    STEPS,
    announcement,
    changes,
    covered,
    load_progress,
    read_saved,
)
from rl.run import Run
from rl.train import parse
from rollout.world.speech import DEFAULT_FOLDER, SpeechBank
from tests.rl.resuming import arguments, content, cut, digests, go, refusal


def test_a_run_that_was_moved_and_renamed(
    whole: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(copy, 1)
    monkeypatch.chdir(copy.parent)
    go(Path("../elsewhere/."), "moved", rl__checkpoint_every=2, rl__save_episodes_every=0, rollout__max_tokens=600)
    assert "rl.checkpoint_every 1 → 2" in capsys.readouterr().out
    assert digests(copy) == digests(whole) and len(set(digests(whole))) == 3
    assert json.loads((copy / "summary.json").read_text())["weights_digest"] == digests(whole)[-1]
    assert yaml.safe_load((copy / "config.yaml").read_text())["name"] == "moved"
    report = audit(copy)
    assert report.verdict == "identical" and not report.not_comparable.contradictions, "old and new checkpoints are its"


def test_the_same_recipe_in_another_text(whole: Path, copy: Path) -> None:
    cut(copy, 2)
    recipe = yaml.safe_load((copy / "config.yaml").read_text())
    del recipe["rl"]["gamma"], recipe["tracking"], recipe["rollout"]["words_per_chunk"]  # as an older version, say
    recipe["rl"]["axis_weights"] = {"timing": 1}
    recipe["scenarios"]["families"] = ["reward.rules.timespeak:TIMESPEAK"]
    text = yaml.safe_dump(dict(reversed(recipe.items())), sort_keys=False, default_flow_style=True)
    (copy / "config.yaml").write_text(f"# by hand\n{text}".replace("lr: 0.003", "lr: 3e-3"))
    go(copy.parent, "moved", warmstart__optim__lr="0.0030", rl__gamma=".9")
    assert digests(copy) == digests(whole)
    assert audit(copy).verdict == "identical"


def test_a_finished_run_stays_as_it_is(copy: Path) -> None:
    before = content(copy)
    said = go(copy.parent, "moved", tracking__project="other")
    assert f"moved is finished: 3 steps, weights {digests(copy)[-1]}. It stays as it is." in said
    assert content(copy) == before
    shutil.rmtree(copy / "checkpoints")
    assert "holds records of a run, but no finished checkpoint" in refusal(copy.parent, "moved")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", r"summary\.json: weights_digest: field required; move it away, and --resume writes it anew"),
        ('{"weights_digest": null}', r"weights_digest: input should be a valid string"),
        ('{"weights_digest": ""}', "weights_digest is ''"),
        ('{"weights_digest": 7', r"summary\.json: is not JSON"),
    ],
)
def test_a_summary_that_names_no_weights_is_no_end(whole: Path, copy: Path, text: str, says: str) -> None:
    (copy / "summary.json").write_text(text)
    assert re.search(says, refusal(copy.parent, "moved"))
    (copy / "summary.json").unlink()
    go(copy.parent, "moved")
    assert json.loads((copy / "summary.json").read_text())["weights_digest"] == digests(whole)[-1]


def test_a_finished_run_whose_model_is_damaged_is_not_called_finished(copy: Path) -> None:
    assert "is finished" in go(copy.parent, "moved")  # the control
    model = copy / "checkpoints/step_000003/model/model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert "model/model.safetensors" in refusal(copy.parent, "moved")
    model.unlink()
    assert "model/model.safetensors is missing" in refusal(copy.parent, "moved")


def test_more_steps(whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rl.steps is 2, but the run in" in refusal(copy.parent, "moved", rl__steps=2)
    go(copy.parent, "moved", rl__steps=4)
    said = capsys.readouterr().out
    assert "rl.steps 3 → 4. The 3 steps already taken keep the learning rates of a run of 3;" in said
    assert digests(copy)[:3] == digests(whole) and len(digests(copy)) == 4
    (note,) = notes(copy)
    assert (note.step, note.changed) == (3, {"rl.steps": (3, 4)})
    assert note.summary == json.loads((whole / "summary.json").read_text())
    report = audit(copy)
    assert report.verdict == "identical" and not report.not_comparable.contradictions
    assert any("The recipe changed at step 3 (rl.steps from 3 to 4)" in gap for gap in report.gaps)
    assert "is finished: 4 steps" in go(copy.parent, "moved", rl__steps=4)
    go(copy.parent, "other", resume=False, rl__steps=4)  # the control: from its start with 4 steps, it is another run
    assert digests(copy.parent / "other")[1:] != digests(copy)[1:]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(whole: Path, copy: Path) -> None:
    for path in copy.iterdir():
        if path.name not in ("config.yaml", "environment.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "checkpoints/.step_000000.partial").mkdir(parents=True)
    assert "speech_dir: None in the run, /x now" in refusal(copy.parent, "moved", speech_dir="/x")
    go(copy.parent, "moved")
    assert digests(copy) == digests(whole) and not notes(copy)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "seed: 0 in the run, 1 now"),
        ({"rl__gamma": 0.8}, "rl.gamma: 0.9 in the run, 0.8 now"),
        ({"rl__axis_weights": "{timing: 2}"}, "rl.axis_weights.timing: 1.0 in the run, 2.0 now"),
        ({"scenarios__timespeak__reward__miss": -3}, "scenarios.timespeak.reward.miss: -1.0 in the run, -3.0 now"),
        ({"scenarios__families": "[turn_taking]"}, "scenarios.families: ['timespeak'] in the run, ['turn_taking'] now"),
        ({"eval__scenarios": 2, "seed": 3}, "seed: 0 in the run, 3 now; eval.scenarios: 1 in the run, 2 now"),
    ],
)
def test_what_decides_bits_is_named_with_both_values(copy: Path, changed: dict[str, Any], says: str) -> None:
    cut(copy, 1)
    said = refusal(copy.parent, "moved", **changed)
    assert says in said and "give the run's values; or start a new run under another --name" in said


def test_every_field_is_free_checked_or_refused(copy: Path) -> None:
    """A field that is added to the recipe decides bits until someone says otherwise."""
    config, _, text = parse(arguments(copy.parent, "moved"))
    names = [name for name, _ in flat(yaml.safe_load(text))]
    for known in {*FREE, *CHECKED, STEPS}:
        assert any(name == known or name.startswith(f"{known}.") for name in names), known
    folder = RunFolder.reopen(copy.parent, "moved")
    saved = read_saved(folder, config).config
    assert changes(folder, saved, config, begun=True) == {}
    for name in ("rl.steps", "rl.checkpoint_every", "rollout.workers", "tracking.project", "model.checkpoint", "seed"):
        now = parse([*arguments(copy.parent, "moved"), f"--{name}", "7"])[0]
        if name == "seed":
            with pytest.raises(MetronomeError, match="seed: 0 in the run, 7 now"):
                changes(folder, saved, now, begun=True)
        else:
            assert changes(folder, saved, now, begun=True).keys() == {name}
    with pytest.raises(MetronomeError, match=r"model\.checkpoint: None in the run, 7 now"):
        changes(folder, saved, parse([*arguments(copy.parent, "moved"), "--model.checkpoint", "7"])[0], begun=False)


@pytest.mark.parametrize(
    ("field", "names", "inside"),
    [
        ("tracking.project", ["tracking"], True),
        ("eval.scenarios", ["seed", "eval.scenarios"], True),
        ("source.watch.every.x", ["source.watch"], True),
        ("rl.steps_more", ["rl.steps"], False),
        ("source", ["source.watch"], False),
        ("rl.steps", ["steps"], False),
        ("seed", [], False),
    ],
)
def test_a_group_covers_its_fields_and_no_others(field: str, names: list[str], inside: bool) -> None:
    assert covered(field, names) == inside


def test_steps_raised_before_any_was_taken_are_announced_without_a_warning() -> None:
    assert announcement({STEPS: (3, 4)}, 0) == "The recipe changed at step 0: rl.steps 3 → 4."
    assert "It is not the run that would have had 4 steps" in announcement({STEPS: (3, 4)}, 1)


def test_a_recipe_that_this_version_does_not_know(copy: Path) -> None:
    with (copy / "config.yaml").open("a") as file:
        file.write("unheard_of: 1\n")
    assert "is no recipe that this version of rl.train can go on with (recipe:" in refusal(copy.parent, "moved")


def test_recordings_count_by_their_content(copy: Path) -> None:
    cut(copy, 2)
    place = Path(shutil.copytree(DEFAULT_FOLDER, copy.parent.parent / "speech"))
    assert load_progress(copy / "checkpoints/step_000002").recordings == SpeechBank.open(place).digest()
    lines = (place / "manifest.jsonl").read_text().splitlines(keepends=True)
    (place / "manifest.jsonl").write_text("".join(reversed(lines)))
    assert "other recordings than the run in" in refusal(copy.parent, "moved", speech_dir=place)
    (place / "manifest.jsonl").write_text("".join(lines))
    config, _, text = parse(arguments(copy.parent, "moved", speech_dir=place))
    Run(config, text, resume=True)  # taken


def test_another_contract_is_refused(copy: Path) -> None:
    cut(copy, 2)
    path = copy / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"contract_id": "0" * 16}))
    said = refusal(copy.parent, "moved")
    assert f"was computed under contract {'0' * 16} (cpu), and this program computes under contract" in said
    assert f"--model.checkpoint={copy}/checkpoints/step_000002/model" in said and "--placement" not in said
    path.unlink()
    assert "does not say under which contract the run was computed" in refusal(copy.parent, "moved")


def test_the_start_checkpoint_may_be_gone_once_the_run_has_its_own(whole: Path, tmp_path: Path) -> None:
    start = shutil.copytree(whole / "checkpoints/step_000003/model", tmp_path / "start")
    go(tmp_path, "a", resume=False, model__checkpoint=start)
    uninterrupted = digests(tmp_path / "a")
    cut(tmp_path / "a", 1)
    shutil.rmtree(start)
    go(tmp_path, "a", model__checkpoint=start)
    assert digests(tmp_path / "a") == uninterrupted
    with pytest.raises(MetronomeError, match="start"):  # the control: a run that begins needs it
        go(tmp_path, "b", resume=False, model__checkpoint=start)
    assert not (tmp_path / "b").exists()
