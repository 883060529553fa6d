"""What a row says of where it comes from: the commit, the device, the precision and the data."""

import hashlib
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def device_name(device: str) -> str:
    """As rows name it: the model of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def precision(dtype: str, device: str) -> str:
    """As rows name it: ``dtype``, or "tf32" where a GPU may round the factors of float32 products."""
    rounds = device.startswith("cuda") and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounds and dtype == "float32" else dtype


def data_name(folder: Path) -> str:
    """A prepared folder as rows name it: its name, and a digest of its dictionaries and indices.

    So that results of another text, in a folder of the same name, are never taken for its own.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".idx" or (path.name.startswith("dict.") and path.suffix == ".txt"):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return f"{folder.name}-{digest.hexdigest()[:8]}"


def commit() -> str:
    """Of this repository, with a plus if files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
