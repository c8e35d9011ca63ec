"""Each hostile input gives the error it must, and leaves files and state as they were."""

import re
from pathlib import Path

import cases_arguments
import cases_optimizer
import cases_recipes
import cases_tables
import pytest
from hostile_table import Case, listing

CASES = [*cases_optimizer.CASES, *cases_arguments.CASES, *cases_tables.CASES, *cases_recipes.CASES]

# transformers' warnings about a model that is none of its own
pytestmark = pytest.mark.filterwarnings("ignore:.*label_names.*:UserWarning")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_hostile_input(case: Case, tmp_path: Path) -> None:
    attempt = case.prepare(tmp_path)
    before = attempt.state(), listing(tmp_path)
    with pytest.raises(case.error) as caught:
        attempt.call()
    assert type(caught.value) is case.error
    assert re.search(case.says, str(caught.value), re.DOTALL), str(caught.value)
    assert len(str(caught.value)) < 2000
    after = attempt.state(), listing(tmp_path)
    assert after == before


def test_the_table_covers_the_public_surface() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 60
