"""Data folders that a script prepares: made aside, moved into place at once, never overwritten unasked."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from runs import process
from text.read import TextFile

__all__ = [
    "RECORD",
    "Corpus",
    "add_shared",
    "digest_of",
    "fingerprint",
    "is_prepared",
    "print_counts",
    "publish",
    "run_prepare",
    "work_folder",
]

RECORD = "prepare.json"


class Corpus(NamedTuple):
    """Data that a command makes.

    Attributes:
        inputs: The files of text by what they are for.
        recorded: The options that change the result.
        ours: Names of the files that the command makes.
        make: Writes them to the folder ``data`` in an empty folder, and tells what each split has; a child of
            it that keeps the given file descriptor open keeps the folder locked.
    """

    inputs: dict[str, list[TextFile]]
    recorded: dict
    ours: set[str]
    make: Callable[[Path, int], dict]

    def publish(self, options: argparse.Namespace) -> bool:
        """Makes the data in ``--output``, at once or not at all; returns False if they are there already.

        Args:
            options: Those of :func:`add_shared` among others.

        Raises:
            ValueError: the folder holds something else, or another run is at work.
        """
        if options.workers < 1:
            raise ValueError(f"--workers {options.workers} must be at least 1")
        identity, output = fingerprint(self.inputs, self.recorded), options.output.resolve()
        if is_prepared(output, identity, options.overwrite, self.ours.__contains__):
            return False
        with work_folder(output) as (work, lock):
            (work / "data").mkdir()
            splits = self.make(work, lock)
            publish(work, output, {"fingerprint": identity, "options": self.recorded, "splits": splits})
        return True


def fingerprint(inputs: dict[str, list[TextFile]], recorded: dict) -> str:
    """Identifies text and options; where the text lies, and when it was written, does not matter.

    Args:
        inputs: The files by what they are for.
        recorded: The options that change the result.
    """
    digest = hashlib.sha256(json.dumps(recorded).encode())
    files = [(role, file) for role in inputs for file in inputs[role]]
    for role, file in tqdm(files, "checking the text", unit="file", leave=False, disable=None):
        content = _content(file.path)
        digest.update(f"{role}\0{file.name}\0{content}\0".encode())
    return digest.hexdigest()


def digest_of(folder: Path) -> str:
    """Identifies the files of a folder of data, by their names and contents."""
    names = "".join(f"{path.name}\0{_content(path)}\0" for path in sorted(folder.iterdir()))
    return hashlib.sha256(names.encode()).hexdigest()


def _content(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_prepared(output: Path, identity: str, overwrite: bool, is_ours: Callable[[str], bool]) -> bool:
    """Whether ``output`` already holds this corpus; refuses to touch a folder with anything else in it.

    Args:
        output: The folder, which need not exist.
        identity: From :func:`fingerprint`.
        overwrite: Whether another corpus of the same script may be replaced.
        is_ours: Whether the script makes a file of that name.

    Raises:
        ValueError: the folder holds something else, or is damaged.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / RECORD).is_file():
        raise ValueError(f"--output {output} exists and was not made by this script: choose another folder")
    record = json.loads((output / RECORD).read_text())
    sizes = {name: (output / name).stat().st_size for name in record["files"] if (output / name).is_file()}
    if overwrite:
        inside = (path for path in output.rglob("*") if path.is_file())
        names = (path.relative_to(output).as_posix() for path in inside)
        foreign = sorted(name for name in names if name not in record["files"] and not is_ours(name))
        if foreign:
            raise ValueError(f"--overwrite would delete files that are not from here: {output}/{foreign[0]}")
        return False
    if record["fingerprint"] != identity:
        raise ValueError(
            f"--output {output} holds another text or was made with other options (see {RECORD} there): "
            "choose another folder, or give --overwrite"
        )
    if sizes != record["files"]:
        raise ValueError(f"--output {output} is damaged (files are missing or cut): give --overwrite")
    return True


@contextmanager
def work_folder(output: Path) -> Iterator[tuple[Path, int]]:
    """An empty folder beside ``output``, locked; what a killed run left in it is cleared away.

    Yields:
        The folder, and a file descriptor; a child that keeps it open keeps the folder locked.

    Raises:
        ValueError: another run is at work.
    """
    work = output.with_name(output.name + ".partial")
    with process.locked(work) as lock:
        try:
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield work, lock
        finally:
            shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, output: Path, record: dict) -> None:
    """Moves ``work / "data"`` to ``output``, with a record of what it is and of the sizes of its files.

    Args:
        work: From :func:`work_folder`.
        output: The folder; what is there now is deleted.
        record: ``fingerprint`` among others.
    """
    paths = sorted(path for path in (work / "data").rglob("*") if path.is_file())
    files = {path.relative_to(work / "data").as_posix(): path.stat().st_size for path in paths}
    (work / "data" / RECORD).write_text(json.dumps({**record, "files": files}, indent=2) + "\n")
    if output.exists():
        os.replace(output, work / "replaced")
    os.replace(work / "data", output)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options that all commands for preparing data have."""
    add, cores = parser.add_argument, min(os.cpu_count() or 1, 8)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the data")
    add("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores}); changes no result")
    add("--overwrite", action="store_true", help="replace other data of this script in DIR")


def run_prepare(
    parser: argparse.ArgumentParser,
    prepare: Callable[[argparse.Namespace], bool],
    arguments: list[str] | None,
) -> dict:
    """Runs a command for preparing data; a mistake of the user ends it with one line and status 2.

    Args:
        parser: Of the command line.
        prepare: Returns False if the data are there already.
        arguments: The command line.

    Returns:
        The record of the data.
    """
    options = parser.parse_args(arguments)
    try:
        new = prepare(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{Path(sys.argv[0]).name}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; nothing was changed\n")
    print(f"{'prepared' if new else 'already prepared'}: {options.output}")
    return json.loads((options.output / RECORD).read_text())


def print_counts(record: dict) -> None:
    """Prints what each split of a record has, documents, lines, tokens and so on, and the digest."""
    for split, counts in record["splits"].items():
        print(f"  {split:5} " + "  ".join(f"{count:>13,} {name}" for name, count in counts.items()))
    if "digest" in record:
        print(f"  digest {record['digest']}")
