from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The parameters of each test of this module that is to run, so that one launch can serve several."""
    here = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params for item in here if hasattr(item, "callspec")]
