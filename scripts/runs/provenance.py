"""What a record says of where it comes from: commit, versions, device, precision and data."""

import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fairseq_flash

__all__ = ["ROOT", "commit", "data_name", "device_name", "precision", "provenance"]

ROOT = Path(__file__).resolve().parents[2]
#: Folders of the data of fairseq's sentence_prediction.
PARTS = ("input[0-9]", "label")


def provenance(device: str, dtype: str = "float32") -> dict[str, str]:
    """The columns that all records share, as far as a table has them.

    Args:
        device: As torch names it.
        dtype: Of the work, as torch names it.
    """
    return {
        "commit": commit(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": _fairseq_version(),
        "device": device_name(device),
        "dtype": precision(dtype, device),
    }


def commit() -> str:
    """Of this repository, with a plus if files differ from it; the release where there is no repository.

    The folder of an installed package may lie in a repository of the user's, whose commit says nothing.
    """
    if not (ROOT / "scripts").is_dir():
        return f"release {fairseq_flash.__version__}"
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    """As records name it: the model of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def precision(dtype: str, device: str) -> str:
    """As records name it: ``dtype``, or "tf32" where a GPU may round the factors of float32 products."""
    rounds = device.startswith("cuda") and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounds and dtype == "float32" else dtype


def data_name(folder: Path) -> str:
    """A prepared folder as records name it: its name, and a digest of its dictionaries and indices.

    So that results of another text, in a folder of the same name, are never taken for its own. Other data
    in a folder below do not count; those of fairseq's sentence_prediction are in such folders themselves.
    """
    digest = hashlib.sha256()
    paths = _numbered(folder.iterdir()) or _numbered(p for part in PARTS for p in folder.glob(f"{part}/*"))
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return f"{folder.name}-{digest.hexdigest()[:8]}"


def _numbered(paths: Iterable[Path]) -> list[Path]:
    """Those that fairseq-preprocess writes, but for the large ones that these index."""
    return [path for path in paths if path.suffix == ".idx" or re.fullmatch(r"dict\..*txt", path.name)]


def _fairseq_version() -> str:
    """Of the distribution that is installed."""
    for name in ("ve-fairseq", "fairseq"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "unknown"
