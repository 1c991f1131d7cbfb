"""The key to every endpoint of these tests."""

import pytest
from provider import KEY, VARIABLE


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key where the run file says that it is."""
    monkeypatch.setenv(VARIABLE, KEY)
