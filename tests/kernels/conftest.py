"""`--hypothesis-profile few`: four examples a test, also where a test asks for more; for builds that run slowly."""

from __future__ import annotations

import pytest
from hypothesis import settings

FEW = 4

settings.register_profile("few", max_examples=FEW, derandomize=True, deadline=None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--hypothesis-profile") != "few":
        return
    for item in items:
        test = getattr(item, "obj", None)
        own = getattr(test, "_hypothesis_internal_use_settings", None)  # what @settings on the test stored
        if own is not None and own.max_examples > FEW:
            test._hypothesis_internal_use_settings = settings(own, max_examples=FEW, derandomize=True)  # type: ignore[union-attr]
