"""Proves that one training at a time saves in a folder, and that no file in it is cut, whatever happens."""

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fairseq import checkpoint_utils

from support import tools


def train(words, folder, *arguments, updates=4) -> str:
    return tools.call("train", *words, "--save-dir", folder, "--max-update", updates, *arguments)


def start(words, folder, *arguments):
    """A fairseq-train process at work."""
    program = os.path.join(os.path.dirname(sys.executable), "fairseq-train")
    return subprocess.Popen(
        [program, *map(str, words), "--save-dir", str(folder), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_second_training_in_a_folder_is_refused_by_name(words_of_training, tmp_path):
    words = words_of_training["flash_lm"]
    first = start(words, tmp_path / "save", "--max-update", 100_000, "--save-interval-updates", 5)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "save" / "checkpoint_last.pt").exists():
            assert first.poll() is None, first.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ValueError, match=r"--save-dir .*save is in use by another training; allowed: "):
            train(words, tmp_path / "save", updates=9)
        assert first.poll() is None
        train(words, tmp_path / "save", "--no-save", updates=9)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    # The lock has ended with the process.
    reached = torch.load(tmp_path / "save" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]
    train(words, tmp_path / "save", updates=reached + 1)


def test_a_training_that_has_ended_in_this_process_frees_its_folder(words_of_training, tmp_path):
    train(words_of_training["flash_lm"], tmp_path / "save")
    lock = os.open(tmp_path / "save", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_a_folder_that_cannot_be_locked_is_used_as_before(words_of_training, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    train(words_of_training["flash_lm"], tmp_path)
    assert (tmp_path / "checkpoint_last.pt").exists()


def test_what_a_kill_left_half_written_is_removed(words_of_training, trained, tmp_path):
    shutil.copytree(trained["flash_lm"].parent, tmp_path / "save")
    for name in ("checkpoint_1_3.pt.tmp", "crash.pt.tmp"):
        (tmp_path / "save" / name).write_bytes(b"PK\x03\x04")
    (tmp_path / "save" / "notes.tmp").write_text("a user's own")
    train(words_of_training["flash_lm"], tmp_path / "save", updates=5)
    left = {path.name for path in (tmp_path / "save").iterdir()}
    assert left == {"checkpoint_best.pt", "checkpoint_last.pt", "notes.tmp"}


class LittleRoom:
    """Lets a file grow to so many bytes; what is written beyond is an OSError, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("room", [10, 5000, 300_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_cut(tmp_path, room):
    path = tmp_path / "checkpoint_last.pt"
    checkpoint_utils.torch_persistent_save({"old": torch.ones(3)}, str(path))
    told = r"checkpoint_last\.pt cannot be written: .*too large"
    with LittleRoom(room), pytest.raises(OSError, match=told):
        checkpoint_utils.torch_persistent_save({"new": torch.ones(10**6)}, str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint_last.pt"]
    assert torch.load(path)["old"].sum() == 3


@pytest.mark.usefixtures("no_pause")
def test_a_second_try_does_not_write_behind_the_first(tmp_path, monkeypatch):
    save, tries = torch.save, []

    def fail_once(obj, file):
        tries.append(file.tell())
        if len(tries) == 1:
            file.write(b"half a file")
            raise OSError("for a moment")
        save(obj, file)

    monkeypatch.setattr(torch, "save", fail_once)
    checkpoint_utils.torch_persistent_save({"new": torch.ones(3)}, str(tmp_path / "x.pt"))
    assert tries == [0, 0]
    assert torch.load(tmp_path / "x.pt")["new"].sum() == 3


def test_a_copy_that_fails_leaves_nothing_cut(tmp_path):
    from fairseq.file_io import PathManager

    (tmp_path / "new.pt").write_bytes(bytes(10_000))
    (tmp_path / "last.pt").write_bytes(b"old")
    with LittleRoom(5000), pytest.raises(OSError, match="too large"):
        PathManager.copy(str(tmp_path / "new.pt"), str(tmp_path / "last.pt"), overwrite=True)
    assert (tmp_path / "last.pt").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "new.pt"]


def test_a_disk_that_is_full_while_training_saves_is_an_error_that_keeps_the_last_checkpoint(
    words_of_training, tmp_path
):
    words = (*words_of_training["flash_lm"], "--save-interval-updates", 1)
    train(words, tmp_path / "save", updates=2)
    before = (tmp_path / "save" / "checkpoint_last.pt").read_bytes()
    with LittleRoom(len(before) // 2):
        full = start(words, tmp_path / "save", "--max-update", 9)
        output = full.communicate(timeout=300)[0].decode()
    assert full.returncode not in (0, -signal.SIGXFSZ)
    assert re.search(r"OSError: .*checkpoint_\S+\.pt cannot be written: .*too large", output)
    assert (tmp_path / "save" / "checkpoint_last.pt").read_bytes() == before
    assert not list((tmp_path / "save").glob("*.tmp"))
    train(words, tmp_path / "save", updates=3)
