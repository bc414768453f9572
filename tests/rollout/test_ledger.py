"""A forward pass of the Triton backend's own host code: what it asks of a device, counted where there is none.

The host waits once, for what it samples; one copy goes in, one comes back; torch launches what is named and no more.
The bits are those of the same kernels on CPU tensors. In processes of their own: a device is made once a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

ENVIRONMENT = {"TRITON_INTERPRET": "1", "METRONOME_BACKEND": "triton"}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.rollout.forwards", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return result(start("ledger"))


def test_a_forward_pass_waits_once(seen: dict[str, Any]) -> None:
    """The first pass of a process also sends, by themselves, the tokens that each class allows and two tables of tiles:
    which sizes its model needs it learns there, and from then on all go with the rest."""
    first, *others = seen["whole"]
    assert {one["kind"] for one in others} == {"prefill", "decode"}
    for one in others:
        assert not one["excess"], one
        totals = one["totals"]
        assert (totals["waits"], totals["copies"], totals["reads"]) == (1, 1, 1)
        assert totals["copied_bytes"] < 1024
    said = [one.split(":")[0] for one in first["excess"]]
    assert said == ["2 waits, at most 1", "4 copies to the device, at most 1"]


def test_a_stray_wait_copy_or_launch_is_named_with_its_line(seen: dict[str, Any]) -> None:
    """The control."""
    slipped = "\n".join(seen["slipped"]["excess"])
    place = r"tests/rollout/forwards\.py:\d+ in run"
    for said in (
        rf"3 waits, at most 1: .*1 x wait, _local_scalar_dense \({place}\)",
        rf"2 copies to the device, at most 1: .*1 x wait, copy to the device \({place}\)",
        rf"5 launches of torch's mul\.Tensor, at most 4: .*1 x launch mul\.Tensor \({place}\)",
    ):
        assert re.search(said, slipped), slipped


def test_a_pass_that_went_wrong_records_no_token(seen: dict[str, Any]) -> None:
    failed = seen["failed"]
    assert re.match(r"sample: row 0 \(class 0\) holds a NaN or \+inf", failed["said"])
    assert failed["before"] == failed["after"] and failed["closed"]


def test_what_the_host_knows_is_checked_before_it_is_sent(seen: dict[str, Any]) -> None:
    token, code = seen["strange"]
    assert token.startswith("InteractionModel: token 1000000 is outside 0..")
    assert code.startswith("InteractionModel: code 200 is outside 0..")


@pytest.mark.slow
def test_bits_are_those_of_cpu_tensors_and_the_learner_is_the_sampler() -> None:
    """A micro-batch of the learner, forward and backward, waits twice: for what its ops noticed, for its results."""
    here, there = (result(process) for process in [start("bits", "cpu"), start("bits", "pretend")])
    counted = [one.pop("asked_by_learner") for one in (here, there)]
    assert here == there and here["learner_is_sampler"]
    assert counted[1]["waits"] == 2 and counted[1]["reads"] == 1
    assert counted[1]["copies"] <= 3  # its rows; the tokens' weights; tables of tiles that only a backward needs, once
    assert not any(counted[0].values())  # nothing is on the device there
