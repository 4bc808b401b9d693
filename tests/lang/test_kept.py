"""What calls have found is kept, and not without end."""

from nestloop.lang.kept import MOST, Kept


def test_values_are_found_once_and_few_are_kept():
    kept, found = Kept[int](), list[int]()

    def find(key: int) -> int:
        return kept.of(key, lambda: found.append(key) or key)  # type: ignore[func-returns-value]

    for _ in range(2):
        for key in range(3):
            assert find(key) == key
    assert found == [0, 1, 2]
    for key in range(3 * MOST):
        find(key)
        assert len(kept) <= MOST
    assert kept.of(None, lambda: 1) + kept.of(None, lambda: 2) == 3 and None not in kept
