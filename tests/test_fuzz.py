"""A few hundred mutated inputs; thousands are in benchmarks/results/fuzz.md."""

import pytest

from benchmarks.fuzz import BAD, fuzz, targets


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's, on damaged files
def test_mutated_files_are_read_rightly_or_refused_in_one_line():
    counts, wrong = fuzz(20 * len(targets()), seed=1)
    assert not wrong, "\n".join(wrong)
    assert all(sum(each.values()) == 20 for each in counts.values())
    assert not any(each[kind] for each in counts.values() for kind in BAD)
