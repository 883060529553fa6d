"""Proves that a process never outlives its parent, and that a folder has one run at a time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import process, slots
from support import tools

#: Runs itself so many times below itself, by the supervisor; the last one sleeps.
CHAIN = """
import os, pathlib, sys, time
sys.path.insert(0, {scripts!r})
from runs import process
depth, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
(folder / f"pid{{depth}}").write_text(str(os.getpid()))
if depth == 0:
    time.sleep(600)
with process.locked(folder / f"work{{depth}}") as lock:
    words = [sys.executable, __file__, depth - 1, folder]
    process.run(words, folder / "log" if depth == 1 else None, keep_open=[lock])
"""
#: Has the folder for a second, and takes it away, as prepare_lm.py does with its work folder.
HOLDER = """
import pathlib, shutil, sys, time
sys.path.insert(0, {scripts!r})
from runs import process
with process.locked(pathlib.Path({folder!r})):
    print("locked", flush=True)
    time.sleep(1)
    shutil.rmtree({folder!r})
"""


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent on Linux alone")
def test_a_killed_command_leaves_no_process_and_its_folders_are_free_at_once(tmp_path):
    script = tmp_path / "chain.py"
    script.write_text(CHAIN.format(scripts=str(tools.REPOSITORY / "scripts")))
    with subprocess.Popen([sys.executable, script, "2", tmp_path]) as first:
        wait_until(lambda: (tmp_path / "pid0").exists() and (tmp_path / "pid0").read_text())
        pids = [int((tmp_path / f"pid{depth}").read_text()) for depth in (0, 1, 2)]
        assert all(map(alive, pids))
        first.send_signal(signal.SIGKILL)
    for depth in (1, 2):
        with process.locked(tmp_path / f"work{depth}"):
            pass
    wait_until(lambda: not any(map(alive, pids)), seconds=5)


def test_a_second_run_waits_for_one_that_is_ending_and_refuses_one_that_works(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE", 0.3)
    refused = pytest.raises(ValueError, match="another run is at work in")
    with process.locked(tmp_path), refused, process.locked(tmp_path):
        pass
    monkeypatch.setattr(process, "PATIENCE", 30)
    code = HOLDER.format(scripts=str(tools.REPOSITORY / "scripts"), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with process.locked(tmp_path):
            assert tmp_path.exists(), "locked a folder that had been taken away"


def test_what_follows_may_end_the_command(tmp_path):
    def stop():
        if (tmp_path / "log").stat().st_size:
            raise KeyError("enough")

    words = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    with pytest.raises(KeyError, match="enough"):
        process.run(words, tmp_path / "log", follow=stop)
    assert not alive(int((tmp_path / "log").read_text()))


def test_a_command_tells_its_status_and_its_peak(tmp_path):
    # from a small process: Linux counts what the parent had when it forked
    code = f"import sys; sys.path.insert(0, {str(tools.REPOSITORY / 'scripts')!r})\n"
    code += "from pathlib import Path\nfrom runs import process\n"
    code += "taken = 'x = bytearray(200 << 20); print(len(x)); raise SystemExit(3)'\n"
    code += "print(*process.run([sys.executable, '-c', taken], Path('log')))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    status, peak_bytes = map(int, found.stdout.split())
    assert status == 3
    assert 200 << 20 < peak_bytes < 400 << 20
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        *((None, 1, "0 0 0"), (None, 2, "0 1 0"), ("5", 1, "5 5 5")),
        ("GPU-a,GPU-b", 2, "GPU-a GPU-b GPU-a"),
    ],
)
def test_each_process_sees_one_of_the_gpus_that_may_be_used(visible, gpus, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [slots.environment(3, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert found == expected.split()
