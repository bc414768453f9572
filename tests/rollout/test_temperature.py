"""A recipe and an engine take the same temperatures."""

from __future__ import annotations

import pytest

from kernels.errors import MetronomeError
from rl.train import parse
from rollout.engines.session import check_temperature

TAKEN = ["0", "0.0", "-0.0", "1e-6", "1", "100.5", "1e6"]
REFUSED = ["1e-9", "9.9e-7", "5e-324", "-1e-6", "1.1e6", ".nan", ".inf"]


@pytest.mark.parametrize("value", TAKEN)
def test_taken_by_both(value: str) -> None:
    check_temperature(parse(["--rollout.temperature", value])[0].rollout.temperature)


@pytest.mark.parametrize("value", REFUSED)
def test_refused_by_both(value: str) -> None:
    with pytest.raises(MetronomeError, match=r"rollout\.temperature is .*: give 0 or 1e-06 to 1,000,000"):
        parse(["--rollout.temperature", value])
    with pytest.raises(ValueError, match=r"temperature is .*: give 0 or 1e-06 to 1,000,000"):
        check_temperature(float(value.replace(".nan", "nan").replace(".inf", "inf")))
