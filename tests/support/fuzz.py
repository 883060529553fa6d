"""Random cases, as many as are wanted, each counted."""

from collections.abc import Callable, Iterable
from typing import Any, Optional

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.robustness import Tally

#: A failure is shown as it was found: to make it smaller takes minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


def fuzzed(sample: int, all_of_them: int) -> pytest.MarkDecorator:
    """Runs a test on so many cases in the default suite, and on so many in the long one."""
    tries = [pytest.param(sample, id="sample"), pytest.param(all_of_them, id="all", marks=pytest.mark.long)]
    return pytest.mark.parametrize("tries", tries)


def try_out(tries: int, tally: Tally, attack: str, case: Callable[[Callable], None]) -> None:
    """Calls ``case(draw)`` as often; hypothesis chooses what ``draw(values, label)`` gives of the values."""

    @settings(deadline=None, max_examples=tries, suppress_health_check=list(HealthCheck), phases=PHASES)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))

        def draw(values: Iterable[Any], label: Optional[str] = None) -> Any:
            return data.draw(st.sampled_from(list(values)), label=label)

        with tally.attempt(attack):
            case(draw)

    run()
