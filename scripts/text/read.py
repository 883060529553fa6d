"""Reads the documents of a corpus as clean lines: plain files, folders, ``.gz``, ``.xz`` and tar archives.

Everything is read as a stream: neither a document nor an archive is ever held in memory or unpacked to disk,
so a member's name in an archive can do no harm.
"""

import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

__all__ = ["TextFile", "find_text_files", "read_documents", "read_lines"]

# A longer line is cut at a space: some corpora are one line of 100 MB, which no tokenizer takes at once.
MAX_LINE_BYTES = 65536

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
DAMAGED = (tarfile.TarError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)


class TextFile(NamedTuple):
    """A file to read, and the name that it has wherever the corpus lies."""

    path: Path
    name: str


class _CountedFile(io.RawIOBase):
    """Reports every byte read, so that a progress bar moves inside a large archive as well."""

    def __init__(self, path: Path, advance: Callable[[int], object]):
        self._file = path.open("rb", buffering=0)
        self._advance = advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._advance(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def find_text_files(paths: Iterable[Path], option: str) -> list[TextFile]:
    """Lists the files that ``paths`` stand for; a folder stands for every file below it that is not hidden.

    Args:
        paths: Files and folders, in the order in which they shall be read.
        option: The option that they came from, for the error message.

    Raises:
        ValueError: a path does not exist, a file's name is not UTF-8, or there is no file at all.
    """
    files = []
    for path in paths:
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.is_file())
            named = [TextFile(p, p.relative_to(path).as_posix()) for p in inside]
            files.extend(file for file in named if not _is_hidden(file.name))
        elif path.is_file():
            files.append(TextFile(path, path.name))
        else:
            raise ValueError(f"{option} {path}: no such file or folder")
    if not files:
        raise ValueError(f"{option} {' '.join(map(str, paths))}: there is no file in it")
    for file in files:
        if any("\udc80" <= character <= "\udcff" for character in str(file.path)):
            raise ValueError(
                f"{option} {os.fsencode(file.path)!r}: the name is not UTF-8; give it another one"
            )
    return files


def read_documents(
    file: TextFile,
    advance: Callable[[int], object] = lambda count: None,
    longest: int | None = None,
    *,
    empty: bool = False,
) -> Iterator[tuple[str, Iterator[str]]]:
    """Reads one file: a document, or an archive of documents.

    Args:
        file: What to read; its name's end tells whether it is compressed or an archive.
        advance: Called with the number of bytes (as stored) after each read.
        longest: Bytes of the longest line; None for ``MAX_LINE_BYTES``.
        empty: Whether to keep empty lines, which may separate paragraphs.

    Yields:
        ``(name, lines)``; the lines must be read before the next document is asked for, or not at all. A line
        has single spaces, no line end, and is never empty unless ``empty`` says so; one over ``longest``
        bytes comes in several pieces.

    Raises:
        ValueError: not UTF-8, or a damaged archive.
    """
    with _explained(file.path), io.BufferedReader(_CountedFile(file.path, advance), 1 << 20) as stored:
        for name, stream in _open_streams(stored, file):
            lines = _clean_lines(stream, file.path, name, longest or MAX_LINE_BYTES)
            yield name, lines if empty else filter(None, lines)


def read_lines(file: TextFile) -> Iterator[str]:
    """Reads every line of a file, empty ones too: for parallel text, in which a line is known by its number.

    Args:
        file: What to read; an archive must hold one file.

    Yields:
        Lines with single spaces and no line end.

    Raises:
        ValueError: not UTF-8, a damaged archive, or a line over ``MAX_LINE_BYTES`` bytes.
    """
    with _explained(file.path), io.BufferedReader(_CountedFile(file.path, lambda count: None)) as stored:
        for name, stream in _open_streams(stored, file):
            position = 0
            while line := _read_line(stream, file.path):
                if len(line) >= MAX_LINE_BYTES:
                    raise ValueError(
                        f"{file.path}: the line at byte {position} has {MAX_LINE_BYTES} bytes or more"
                    )
                yield " ".join(_decode(line, position, file.path, name).split())
                position += len(line)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged, or not what its name says ({error})") from error


def _open_streams(stored: BinaryIO, file: TextFile) -> Iterator[tuple[str, BinaryIO]]:
    if file.path.name.endswith(TAR_SUFFIXES):
        yield from _open_members(stored)
    elif file.path.suffix == ".gz":
        with gzip.open(stored) as stream:
            yield file.name, stream
    elif file.path.suffix == ".xz":
        with lzma.open(stored) as stream:
            yield file.name, stream
    else:
        yield file.name, stored


def _open_members(stored: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    with tarfile.open(fileobj=stored, mode="r|*") as archive:
        for member in archive:
            if member.isreg() and not _is_hidden(member.name):
                yield PurePosixPath(member.name).as_posix(), archive.extractfile(member)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)


def _clean_lines(stream: BinaryIO, path: Path, name: str, longest: int) -> Iterator[str]:
    position, rest = 0, b""
    while chunk := rest + _read_line(stream, path, longest):
        end = len(chunk) if chunk.endswith(b"\n") or len(chunk) < longest else _cut(chunk)
        piece, rest = chunk[:end], chunk[end:]
        # split() knows every kind of space: fairseq would break a piece of the vocabulary that holds one
        line = " ".join(_decode(piece, position, path, name).split())
        position += end
        yield line


def _read_line(stream: BinaryIO, path: Path, longest: int | None = None) -> bytes:
    with _explained(path):
        return stream.readline(longest or MAX_LINE_BYTES)


def _cut(chunk: bytes) -> int:
    """Where to cut a line that is too long: after its last space, else before its last character."""
    space = chunk.rfind(b" ") + 1
    if space:
        return space
    starts = (i for i in range(len(chunk) - 1, 0, -1) if chunk[i] & 0xC0 != 0x80)
    return next(starts, len(chunk))


def _decode(piece: bytes, position: int, path: Path, name: str) -> str:
    try:
        return piece.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark
        mark = 3 if position == 0 and piece.startswith(b"\xef\xbb\xbf") else 0
        where = f"{path}" if path.name == PurePosixPath(name).name else f"{path}, member {name}"
        raise ValueError(
            f"{where}: not UTF-8 at byte {position + mark + error.start}; "
            "convert it first, for example: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
        ) from error
