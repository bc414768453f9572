"""Fixtures of the tests of services."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from rollout.engines.service import Service
from tests.support.models import fresh_model
from tests.support.services import make_service


@pytest.fixture(scope="session")
def make() -> Callable[..., Service]:
    """Makes services on one model; arguments as `make_service` has them."""
    return partial(make_service, fresh_model())
