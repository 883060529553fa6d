"""A CSV file of measurements that is resumed: cells that are there are not measured again."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Table:
    """A CSV file: cells that are there are not measured again.

    Args:
        path: Of the file, which need not exist.
        columns: Of the file.
        key: The columns that tell a cell, beside ``name``.
        shown: The columns that are printed when a row is added; empty for no print.
        common: What all rows say.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(
        self, path: Path, columns: Iterable[str], key: Iterable[str], shown: Iterable[str], common: dict
    ) -> None:
        self.path, self.common = path, common
        self.columns, self.key, self.shown = tuple(columns), tuple(key), tuple(shown)
        rows: list[dict] = []
        if path.exists():
            drop_torn_line(path)
            with path.open(newline="") as stream:
                reader = csv.DictReader(stream)
                found = tuple(reader.fieldnames or ())
                rows = list(reader)
            if found and found != self.columns:
                raise ValueError(
                    f"--output {path} has the columns {','.join(found)}; "
                    f"allowed: {','.join(self.columns)}, or a new file"
                )
        self._known = {self._cell(row) for row in rows}

    def _cell(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("name", *self.key))

    def has(self, names: Iterable[str], **cell: Any) -> bool:
        """Whether all of ``names`` have been measured there."""
        return all(self._cell({**self.common, **cell, "name": name}) in self._known for name in names)

    def add(self, rows: list[dict]) -> None:
        """Appends the rows of one cell, so that a kill leaves whole cells."""
        whole = [{**dict.fromkeys(self.columns, ""), **self.common, **row} for row in rows]
        new = not self.path.exists() or not self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if new:
                writer.writeheader()
            writer.writerows(whole)
        self._known |= {self._cell(row) for row in whole}
        for row in rows if self.shown else ():
            print("  ".join(f"{name}={row[name]}" for name in row if name in self.shown), flush=True)


def drop_torn_line(path: Path) -> None:
    """Cuts a last line without an end, which a kill while writing leaves."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
