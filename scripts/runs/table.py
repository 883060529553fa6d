"""A CSV file of measurements that is resumed: cells that are there are not measured again."""

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

__all__ = ["Table", "read"]

#: What a spreadsheet would take for a formula, with the quotes that keep it from that.
_FORMULA = re.compile(r"'*\s*[=+@\uff1d\uff0b\uff20\uff0d-]")


def read(path: Path) -> list[dict[str, str]]:
    """The records of a file; none where there is no file. A last line that a kill tore is left out."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = io.StringIO(data[: data.rfind(b"\n") + 1].decode(errors="replace"), newline="")
    return [{name: _unquoted(cell) for name, cell in record.items()} for record in csv.DictReader(whole)]


class Table:
    """A file of records, each told by some of its columns.

    Args:
        path: Of the file, which need not exist.
        columns: Of the file.
        key: The columns that tell a record, beside ``name``.
        shown: The columns that are printed when a record is added; empty for no print.
        common: What all records say, as far as the file has such columns.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(
        self, path: Path, columns: Iterable[str], key: Iterable[str], shown: Iterable[str], common: dict
    ) -> None:
        self.path, self.columns, self.key, self.shown = path, tuple(columns), tuple(key), tuple(shown)
        self.common = {name: value for name, value in common.items() if name in self.columns}
        if path.exists():
            _drop_torn_line(path)
            with path.open(newline="") as stream:
                found = tuple(next(csv.reader(stream), ()))
            if found and found != self.columns:
                raise ValueError(
                    f"--output {path} has the columns {','.join(found)}; "
                    f"allowed: {','.join(self.columns)}, or a new file"
                )
        self._known = {self._cell(record) for record in read(path)}

    def _cell(self, record: dict) -> tuple[str, ...]:
        return tuple(str(record[name]) for name in ("name", *self.key))

    def has(self, names: Iterable[str], **cell: Any) -> bool:
        """Whether all of ``names`` have been measured there."""
        return all(self._cell({**self.common, **cell, "name": name}) in self._known for name in names)

    def add(self, records: list[dict]) -> None:
        """Appends records at once, so that a kill leaves all of them or none."""
        whole = [{**dict.fromkeys(self.columns, ""), **self.common, **record} for record in records]
        new = not self.path.exists() or not self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(self.path, "a", whole, header=new)
        self._known |= {self._cell(record) for record in whole}
        for record in records if self.shown else ():
            # Beside a bar, if there is one.
            tqdm.write("  ".join(f"{name}={record[name]}" for name in record if name in self.shown))
            sys.stdout.flush()

    def forget(self, which: Callable[[dict[str, str]], bool]) -> None:
        """Takes away records, so that they are measured again."""
        records = read(self.path)
        kept = [record for record in records if not which(record)]
        if len(kept) < len(records):
            new = self.path.with_name(f"{self.path.name}.new")
            self._write(new, "w", kept, header=True)
            os.replace(new, self.path)
            self._known = {self._cell(record) for record in kept}

    def forget_failed(self) -> None:
        """Takes away records of what failed, those that a signal has ended among them."""
        self.forget(lambda record: (record["status"] or "").startswith("error:"))

    def forget_killed(self) -> None:
        """Takes away records of processes that a signal has ended: status -64 to -1, or 129 to 192."""

        def killed(record: dict[str, str]) -> bool:
            found = re.match(r"error: status (-?\d+)", record["status"] or "")
            return found is not None and int(found[1]) in {*range(-64, 0), *range(129, 193)}

        self.forget(killed)

    def find(self, name: str, **cell: Any) -> Optional[dict[str, str]]:
        """The record of a cell, the last of several; None if it has not been measured."""
        key = self._cell({**self.common, **cell, "name": name})
        return next((record for record in reversed(read(self.path)) if self._cell(record) == key), None)

    def _write(self, path: Path, mode: str, records: list[dict], *, header: bool) -> None:
        quoted = [{name: _quoted(cell) for name, cell in record.items()} for record in records]
        with path.open(mode, newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if header:
                writer.writeheader()
            writer.writerows(quoted)


def _quoted(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) and not _is_number(cell) else cell


def _unquoted(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
