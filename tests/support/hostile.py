"""Checkpoints that nobody should load: cut, damaged, of another kind, hungry for memory, or with code."""

import builtins
import contextlib
import functools
import io
import os
import pickle
import resource
import tarfile
import zipfile
from pathlib import Path

import torch

HUGE = 8 << 30
MEMORY = 1 << 30  # bytes more than now; every hungry file asks for more


@contextlib.contextmanager
def little_memory():
    """Lets this process take a gigabyte more, and no more."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Call:
    """Pickled as a call of ``function``, which is made where the pickle is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def codes(marker: Path) -> dict:
    """Objects that write ``marker`` if anybody unpickles them without a check."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "getattr": Call(getattr, Call(builtins.__import__, "os"), "system"),
        "partial": functools.partial(eval, code),
    }


def changed(good: Path, target: Path, change, **how) -> Path:
    """Copies a checkpoint with ``change`` applied to its dict."""
    state = torch.load(good)
    state = change(state) or state
    torch.save(state, target, **how)
    return target


def weight_of(state: dict) -> torch.Tensor:
    """A weight of a checkpoint's model."""
    return next(weight for name, weight in state["model"].items() if name.endswith("weight"))


def records(path: Path) -> dict[str, bytes]:
    """What lies in the archive, by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes an archive as torch does, or not as torch does."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def flipped(good: Path, target: Path, position: int) -> Path:
    """Copies a file with one bit of it changed."""
    data = bytearray(good.read_bytes())
    data[position] ^= 0x10
    target.write_bytes(data)
    return target


def place_of(path: Path, record: str) -> int:
    """Where the middle byte of a record lies in the file."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(record))
        data = archive.read(name)
    return path.read_bytes().index(data) + len(data) // 2


def malformed(good: Path, folder: Path) -> dict[str, Path]:
    """Files that hold no checkpoint of fairseq, or only a part of one."""
    data = good.read_bytes()
    made = {
        "empty": b"",
        "text": b"once upon a time\n" * 50,
        "zeros": bytes(4096),
        "first bytes": data[:100],
        "half": data[: len(data) // 2],
        "less a byte": data[:-1],
        "prefixed": b"PK\x03\x04" + data,
        "pickle": pickle.dumps({"model": {}}, protocol=4),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "truncated pickle": pickle.dumps({"model": {}}, protocol=2)[:-3],
    }
    files = {}
    for name, content in made.items():
        files[name] = folder / f"{name.replace(' ', '_')}.pt"
        files[name].write_bytes(content)
    with tarfile.open(folder / "tar.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    files["tar"] = folder / "tar.pt"
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, folder / "script.pt")
    files["TorchScript"] = folder / "script.pt"
    for name, content in {
        "a list": [1, 2],
        "a number": 3,
        "weights alone": torch.load(good)["model"],
        "weights without a configuration": {"model": torch.load(good)["model"]},
    }.items():
        files[name] = folder / f"{name.replace(' ', '_')}.pt"
        torch.save(content, files[name])
    files["other archive"] = write_archive(folder / "other.pt", {"a.txt": b"a"})
    files["archive of a folder"] = write_archive(folder / "folder.pt", {"x/a.txt": b"a"})
    files["twice"] = folder / "twice.pt"
    files["twice"].write_bytes(data + data)
    for name, change in {
        "no configuration": lambda state: state.update(cfg=None, args=None),
        "no weights": lambda state: state.pop("model") and None,
        "weights of another kind": lambda state: state.update(model=[1]),
    }.items():
        files[name] = changed(good, folder / f"{name.replace(' ', '_')}.pt", change)
    return files


def damaged(good: Path, folder: Path) -> dict[str, Path]:
    """Checkpoints with one bit wrong, or whose weights are no numbers."""
    files = {
        name: flipped(good, folder / f"flipped_{number}.pt", place_of(good, record))
        for number, (name, record) in enumerate(
            {"flipped weight": "data/1", "flipped pickle": ".pkl"}.items()
        )
    }

    def spoil(state):
        weight_of(state).view(-1)[-1] = torch.nan

    files["NaN"] = changed(good, folder / "nan.pt", spoil)
    return files


def hungry(good: Path, folder: Path) -> dict[str, Path]:
    """Small files that ask for gigabytes, each in another way."""

    def laughs(state):
        laugh = ["ha"] * 10
        for _ in range(9):
            laugh = [laugh] * 10
        state["cfg"]["common"]["laughs"] = laugh

    def copies(state):
        text = "x" * 10**5
        state["extra_state"]["copies"] = [Call(list, text) for _ in range(10**4)]

    def itself(state):
        held = []
        held.append(held)
        state["cfg"]["common"]["held"] = held

    def deep(state):
        # torch.save itself is recursive.
        held = []
        for _ in range(300):
            held = [held]
        state["extra_state"]["deep"] = held

    def extra(value):
        return lambda state: state["extra_state"].update(hungry=value)

    changes = {
        "bytearray": extra(Call(bytearray, HUGE)),
        "tensor of a size": extra(Call(torch.FloatTensor, HUGE)),
        "storage of a size": extra(Call(torch.UntypedStorage, HUGE)),
        "expanded tensor": extra(torch.zeros(1).expand(HUGE)),
        "sparse tensor": extra(torch.sparse_coo_tensor([[0]], [1.0], (HUGE,))),
        "meta tensor": extra(torch.empty(HUGE, device="meta")),
        "expanded weight": lambda s: s["model"].update({k: torch.zeros(1).expand(HUGE) for k in s["model"]}),
        "laughs": laughs,
        "copies": copies,
        "itself": itself,
        "deep": deep,
    }
    files = {
        name: changed(good, folder / f"{n}.pt", change) for n, (name, change) in enumerate(changes.items())
    }
    content = records(good)
    storage = next(name for name in content if name.endswith("data/1"))
    files["claimed storage"] = write_archive(folder / "claimed.pt", {**content, storage: b"\0"})
    zeros = {**content, storage: bytes(2**26)}
    files["compressed"] = write_archive(folder / "compressed.pt", zeros, zipfile.ZIP_DEFLATED)
    how = {"_use_new_zipfile_serialization": False}
    files["legacy bytearray"] = changed(good, folder / "legacy.pt", extra(Call(bytearray, HUGE)), **how)
    files["legacy, cut"] = folder / "legacy_cut.pt"
    files["legacy, cut"].write_bytes(
        changed(good, folder / "whole.pt", lambda s: None, **how).read_bytes()[:-5000]
    )
    return files


def coded(good: Path, folder: Path, marker: Path) -> dict[str, Path]:
    """Checkpoints of both formats with code in them that writes ``marker``."""
    files = {}
    for name, code in codes(marker).items():
        for how in ("", "legacy "):
            path = folder / f"{how}{name}.pt".replace(" ", "_")
            files[how + name] = changed(
                good,
                path,
                lambda state, code=code: state["extra_state"].update(code=code),
                _use_new_zipfile_serialization=not how,
            )
    return files
