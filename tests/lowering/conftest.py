"""`pytest tests/lowering --update-golden` writes the golden texts again, to be read before they are committed."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", default=False, help="write golden texts again")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden texts are written instead of compared."""
    return bool(request.config.getoption("update_golden", False))
