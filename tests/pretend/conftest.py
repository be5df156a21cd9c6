"""Tests on a GPU that is not there: each starts processes of its own, for the device must come before torch."""

import os

import device
import pytest


@pytest.fixture(scope="session", autouse=True)
def _pretended():
    """Where the device cannot be built, its tests are skipped, or fail where they are required."""
    lacks = device.missing()
    if lacks and os.environ.get("PPCL_REQUIRE_PRETEND"):
        pytest.fail(f"PPCL_REQUIRE_PRETEND is set, and there is no pretended GPU: {lacks}")
    if lacks:
        pytest.skip(f"no pretended GPU: {lacks}")
    device.build()
