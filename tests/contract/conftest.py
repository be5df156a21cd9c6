"""Every test of the contract runs for every family, on its `world`."""

import pytest
import tiny
from worlds import FAMILIES, World, made


@pytest.fixture(scope="session", autouse=True)
def _small_edits():
    with pytest.MonkeyPatch.context() as patch:
        tiny.small_edits(patch.setattr)
        yield


@pytest.fixture(scope="session")
def worlds(tmp_path_factory) -> dict[str, World]:
    """All families."""
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def world(request, worlds) -> World:
    """Each family."""
    return worlds[request.param]
