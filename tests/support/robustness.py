"""How many attacks were tried and survived: counted by tests, shown in docs/robustness.md."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "docs" / "robustness.md"


class Tally:
    """Counts the tries of each attack; one is survived if nothing was raised."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()

    @contextlib.contextmanager
    def attempt(self, attack: str) -> Iterator[None]:
        """One try of an attack that the table has a row for."""
        try:
            yield
        except BaseException as error:
            # What hypothesis stops by itself, such as a draw of too many values, was no try.
            self.tries[attack] += not type(error).__module__.startswith("hypothesis")
            raise
        self.tries[attack] += 1
        self.survived[attack] += 1

    def fill(self, table: str) -> str:
        """The table with this run's numbers in the rows of its attacks; what was found stays.

        Raises:
            ValueError: the table has no row for an attack.
        """
        for attack, tries in self.tries.items():
            row = rf"^(\| {re.escape(attack)} \|)[^|]*\|[^|]*\|"
            table, found = re.subn(
                row, rf"\g<1> {tries} | {self.survived[attack]} |", table, flags=re.MULTILINE
            )
            if found != 1:
                raise ValueError(f"{found} rows begin with {attack!r}; allowed: 1")
        return table
