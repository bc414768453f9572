"""A setting that nothing would read is refused, and only where nothing would; so are processes of two contracts."""

from __future__ import annotations

import pytest

from kernels.errors import MetronomeError
from model.program import ranks, shipped
from rl.consistency import UNREAD, check_contracts, check_read
from rl.train import parse

CASES = {
    "rollout.worker_threads": [("2", [], ["--rollout.workers", "2"]), ("1", ["--rollout.engine", "vllm"], [])],
    "rollout.worker_timeout_s": [("60", ["--rollout.workers", "0"], ["--rollout.workers", "2"])],
    "rollout.context.first": [("128", [], ["--rollout.context.policy", "window"])],
    "rollout.context.window": [("128", [], ["--rollout.context.policy", "window"])],
    "rollout.context.budget": [("128", [], ["--rollout.context.policy", "summary"])],
    "rollout.context.request": [("say it again", ["--rollout.context.policy", "window"], [])],
    "rollout.context.summary_words": [("8", [], ["--rollout.context.policy", "summary"])],
    "tracking.mode": [("online", [], ["--tracking.trackers", "[wandb]"])],
    "tracking.project": [("mine", [], ["--tracking.trackers", "[wandb]"])],
    "hub.private": [("false", [], ["--hub.repo", "a/b"])],
    "hub.every": [("checkpoint", [], ["--hub.repo", "a/b"])],
    "hub.timeout_s": [("60", [], ["--hub.repo", "a/b"])],
    "model.voice": [("{}", ["--model.checkpoint", "m"], [])],
    "source.watch": [("{patience: 3}", [], ["--source.models", "[m]", "--source.rewards", "learned"])],
    "eval.during": [("9", ["--eval.scenarios", "8"], ["--eval.scenarios", "9"])],
}
"""Setting -> (its value, what makes it unread, what makes it read)."""


def test_every_setting_of_the_table_has_a_case() -> None:
    assert {name for names, _, _ in UNREAD for name in names} == set(CASES)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_setting_that_nothing_reads_is_refused(name: str) -> None:
    for value, unread, read in CASES[name]:
        with pytest.raises(MetronomeError, match=rf"^{name} is .* would be ignored: .*\. Leave it out"):
            check_read(parse([f"--{name}", value, *unread])[0])
        check_read(parse(unread)[0])  # the controls: not given, …
        if read:
            check_read(parse([f"--{name}", value, *read])[0])  # … and read


def test_threads_of_vllms_process_are_not_ours() -> None:
    with pytest.raises(MetronomeError, match="divides the cores itself"):
        check_read(parse(["--rollout.engine", "vllm", "--rollout.workers", "1", "--rollout.worker_threads", "1"])[0])
    check_read(parse(["--rollout.engine", "vllm", "--rollout.workers", "1", "--rollout.worker_timeout_s", "9"])[0])


def test_shipped_recipes_are_read_whole() -> None:
    recipes = [name for name in shipped.names() if name.startswith(("quickstart", "scale"))]
    assert len(recipes) > 4
    for name in recipes:
        check_read(parse(["--config", name])[0])


def test_processes_of_two_contracts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_contracts()  # of one process
    monkeypatch.setattr(ranks, "gather", lambda words: [words, words])
    check_contracts()
    monkeypatch.setattr(ranks, "gather", lambda words: [words, "contract 0 (triton on sm_80)"])
    with pytest.raises(MetronomeError, match=r"^process 1 .* contract 0 \(triton on sm_80\), process 0 under"):
        check_contracts()
