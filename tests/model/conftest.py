"""Each test that asks for `backend` runs on both; the rest run on the default one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels.dispatch import backend as active
from kernels.dispatch import use_backend


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = active().NAME
    use_backend(request.param)
    yield request.param
    use_backend(before)
