"""Proves that SIGTERM ends a training with a checkpoint, from which the same command goes on to the bit."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from support import tools
from support.tiny_fairseq import DISTRIBUTED


def start(words, folder, *arguments, program=(), session=False):
    """A training at work, whose output goes to a file in ``folder``."""
    program = program or (os.path.join(os.path.dirname(sys.executable), "fairseq-train"),)
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{sys.prefix}/bin:{os.environ['PATH']}"
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*map(str, program), *map(str, words), "--save-dir", str(folder / "save"), *map(str, arguments)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=session,
        )


def wait_for(process, folder, pattern, seconds=180):
    """The first line of the log that has the pattern."""
    deadline = time.monotonic() + seconds
    while not (found := re.search(pattern, (folder / "log").read_text())):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def weights(folder):
    state = torch.load(folder / "save" / "checkpoint_last.pt")
    return state["optimizer_history"][-1]["num_updates"], state["model"]


def assert_continues_to_the_bit(words, folder, program, stopped, tmp_path):
    """Goes on for three updates, beside a training that nothing disturbed."""
    last = stopped + 3
    for path in (folder, tmp_path / "straight"):
        process = start(words, path, "--max-update", last, program=program)
        assert process.wait(300) == 0, (path / "log").read_text()
    (updates, found), (of_straight, expected) = weights(folder), weights(tmp_path / "straight")
    assert updates == of_straight == last
    for name, weight in expected.items():
        if torch.is_tensor(weight):
            assert torch.equal(weight, found[name]), name


def test_sigterm_saves_and_the_same_command_goes_on(words_of_training, tmp_path):
    """Sent to all of a process's session, workers that load data among them, as schedulers do."""
    words = (*words_of_training["flash_lm"], "--num-workers", 1, "--dropout", "0.1")
    process = start(words, tmp_path / "asked", "--max-update", 100_000, session=True)
    try:
        wait_for(process, tmp_path / "asked", '"num_updates": "5"')
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, (tmp_path / "asked" / "log").read_text()
    finally:
        process.kill()
    stopped, _ = weights(tmp_path / "asked")
    text = (tmp_path / "asked" / "log").read_text()
    assert f"SIGTERM: training ends after update {stopped}; the same command goes on from there" in text
    assert "Traceback" not in text
    assert_continues_to_the_bit(words, tmp_path / "asked", (), stopped, tmp_path)


@pytest.mark.long
def test_two_processes_end_at_the_same_update_and_go_on(words_of_training, tmp_path):
    words, program = (*words_of_training["flash_lm"], "--num-workers", 1), (DISTRIBUTED, "--nproc", 2)
    process = start(words, tmp_path / "asked", "--max-update", 100_000, program=program)
    try:
        wait_for(process, tmp_path / "asked", '"num_updates": "5"')
        # To all, as Slurm does: torchrun passes it on, so that its processes have it twice.
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    stopped, _ = weights(tmp_path / "asked")
    assert f"SIGTERM: training ends after update {stopped}" in (tmp_path / "asked" / "log").read_text()
    assert_continues_to_the_bit(words, tmp_path / "asked", program, stopped, tmp_path)


def test_a_training_in_this_process_takes_the_signal_and_gives_it_back(
    words_of_training, tmp_path, monkeypatch
):
    from fairseq.trainer import Trainer

    step = Trainer.train_step

    def asked(self, *args, **kwargs):
        if self.get_num_updates() == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", asked)
    words = (*words_of_training["flash_lm"], "--save-dir", tmp_path / "save", "--max-update", 9)
    with pytest.raises(SystemExit) as ended:
        tools.call("train", *words)
    assert ended.value.code == 143
    assert weights(tmp_path)[0] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    tools.call("train", *words)
    assert weights(tmp_path)[0] == 9


def test_a_second_request_ends_at_once_but_not_the_same_one_again():
    program = (
        "import os, signal, time\n"
        "from fairseq_flash._compat import ending\n"
        "ending.SAME_REQUEST = 0.2\n"
        "ending._request.watch()\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
        "print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    done = tools.run("python", "-c", program, PYTHONPATH=str(tools.REPOSITORY))
    assert done.stdout.endswith("still here\n")
    assert done.returncode == -signal.SIGTERM


def processes_of(folder):
    """Numbers of the running processes that name ``folder`` on their command line."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 1) for line in listing.stdout.splitlines()]
    return [int(pid) for pid, words in rows if str(folder) in words]


def test_someone_elses_handler_stays(words_of_training, tmp_path):
    def own(*_):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        tools.call("train", *words_of_training["flash_lm"], "--save-dir", tmp_path, "--max-update", 1)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
