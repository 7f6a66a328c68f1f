"""These tests look at figures."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _whole(whole_figures):
    """As they are drawn for users."""
