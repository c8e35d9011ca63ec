"""What the suite must not ask of a machine: to be fast, or to be free."""

import time

from hypothesis import given
from hypothesis import strategies as st


@given(st.just(0.25))
def test_an_example_may_take_its_time(seconds: float) -> None:
    """Hypothesis's own limit is 0.2 s an example, which a busy machine passes in any test."""
    time.sleep(seconds)
