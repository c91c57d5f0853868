import pytest


@pytest.fixture(autouse=True)
def _one_head_judges_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a fit of this size goes into the heads that judge the rounds; tests/removal has all."""
    monkeypatch.setattr("demem.removal.budget.JUDGED", 1)
