"""Proves that scripts/train_distributed.sh trains as one process would, resumes, and never fails silently."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from support.tiny_fairseq import DISTRIBUTED, arguments, run, train_in_two, write_data_bin

# Two processes sum in another order than one: 8 epsilons of float32. Measured: 0.45 epsilons on the training
# loss, 0.52 on the validation loss, 0 on the weights; half the batch gives 60000.
TOLERANCE = 8 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def data_bin(tmp_path_factory):
    return write_data_bin(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def two_processes(data_bin, tmp_path_factory):
    """The folder of a run of two processes over four updates."""
    folder = tmp_path_factory.mktemp("two")
    result = train_in_two(data_bin, folder, "--max-update", "4")
    assert result.returncode == 0, result.stdout
    return folder


def read_losses(folder):
    """Updates, training loss and validation loss of a run, unrounded, and its weights."""
    state = torch.load(folder / "checkpoint_last.pt")
    metrics = state["extra_state"]["metrics"]
    meters = [row[3] for part in ("train", "valid") for row in metrics[part] if row[1] == "loss"]
    losses = [float(meter["sum"]) / float(meter["count"]) for meter in meters]
    return state["optimizer_history"][-1]["num_updates"], losses, state["model"]


def test_two_processes_give_the_losses_of_one_with_twice_the_batches(two_processes, data_bin, tmp_path):
    command = ["fairseq-train", *arguments(data_bin, tmp_path), "--max-update", "4", "--update-freq", "2"]
    result = run(command)
    assert result.returncode == 0, result.stdout
    updates, losses, weights = read_losses(tmp_path)
    updates_of_two, losses_of_two, weights_of_two = read_losses(two_processes)
    assert updates == updates_of_two == 4
    assert losses_of_two == pytest.approx(losses, rel=TOLERANCE, abs=0)
    for name, weight in weights.items():
        assert (weight - weights_of_two[name]).abs().max() <= TOLERANCE, name


def test_one_process_alone_gives_other_losses(two_processes, data_bin, tmp_path):
    assert run(["fairseq-train", *arguments(data_bin, tmp_path), "--max-update", "4"]).returncode == 0
    assert read_losses(tmp_path)[1] != pytest.approx(read_losses(two_processes)[1], rel=TOLERANCE, abs=0)


@pytest.mark.long
def test_two_processes_resume_where_they_stopped(data_bin, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_in_two(data_bin, whole, "--max-update", "6").returncode == 0
    assert train_in_two(data_bin, parts, "--max-update", "3").returncode == 0
    result = train_in_two(data_bin, parts, "--max-update", "6")
    assert result.returncode == 0, result.stdout
    assert "@ 3 updates" in result.stdout
    assert read_losses(parts)[0] == 6
    for name, weight in read_losses(whole)[2].items():
        assert torch.equal(weight, read_losses(parts)[2][name]), name


def start_node(data_bin, folder, rank, port, nodes=2, timeout=90, updates=4):
    """One of several machines, with one process, all on this one."""
    words = [DISTRIBUTED, "--nproc", "1", *arguments(data_bin, folder), "--max-update", updates]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    environment |= {"NNODES": nodes, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in {**environment, "TIMEOUT": timeout}.items()}
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(list(map(str, words)), env=environment, **streams)


@pytest.fixture
def port():
    """One that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.long
def test_two_machines_train_as_two_processes(two_processes, data_bin, tmp_path, port):
    nodes = [start_node(data_bin, tmp_path / "save", rank, port) for rank in (1, 0)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    updates, losses, weights = read_losses(tmp_path / "save")
    of_two, losses_of_two, weights_of_two = read_losses(two_processes)
    assert updates == of_two
    assert losses == losses_of_two
    for name, weight in weights.items():
        assert torch.equal(weight, weights_of_two[name]), name


@pytest.mark.long
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 0)], ids=["no second", "no first", "twice the first"])
def test_a_machine_that_does_not_come_is_an_error_in_bounded_time(data_bin, tmp_path, port, ranks):
    nodes = [start_node(data_bin, tmp_path / "save", rank, port, timeout=15) for rank in ranks]
    try:
        assert all(node.wait(150) != 0 for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert not (tmp_path / "save" / "checkpoint_last.pt").exists()


@pytest.mark.long
def test_a_port_in_use_is_an_error_in_bounded_time(data_bin, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        node = start_node(data_bin, tmp_path / "save", 0, taken.getsockname()[1], timeout=15)
        output, _ = node.communicate(timeout=150)
    assert node.returncode != 0
    assert "EADDRINUSE" in output or "address already in use" in output


@pytest.mark.parametrize(
    ("rank", "nodes", "message"),
    [
        (2, 2, "NODE_RANK is '2'; allowed are 0 to 1, another on each machine"),
        ("first", 2, "NODE_RANK is 'first'; allowed are 0 to 1, another on each machine"),
        (0, "two", "NNODES is 'two'; allowed are whole numbers from 1"),
    ],
)
def test_a_wrong_machine_is_explained(tmp_path, rank, nodes, message):
    node = start_node("data", tmp_path, rank, 29500, nodes=nodes)
    output, _ = node.communicate(timeout=60)
    assert node.returncode == 2
    assert message in output


@pytest.mark.long
def test_a_sharded_optimizer_trains_as_a_whole_one_and_its_checkpoint_is_whole(data_bin, tmp_path):
    """Two processes that share it, then each with all of it, then again."""
    pytest.importorskip("fairscale", reason="the extra 'sharded' is not installed")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_in_two(data_bin, whole, "--max-update", "6").returncode == 0
    for last, sharding in (("2", "os"), ("4", "none"), ("6", "os")):
        result = train_in_two(data_bin, parts, "--max-update", last, "--zero-sharding", sharding)
        assert result.returncode == 0, result.stdout
    for name, weight in read_losses(whole)[2].items():
        assert torch.equal(weight, read_losses(parts)[2][name]), name
    states = [
        torch.load(path / "checkpoint_last.pt")["last_optimizer_state"]["state"] for path in (whole, parts)
    ]
    assert len(states[0]) == len(states[1])
    for index, state in states[0].items():
        assert torch.equal(state["exp_avg_sq"], states[1][index]["exp_avg_sq"]), index


def test_a_wrong_data_path_is_a_failure(tmp_path):
    result = train_in_two(tmp_path / "nowhere", tmp_path / "out", "--max-update", "4")
    assert result.returncode != 0
    assert "nowhere" in result.stdout


@pytest.mark.long
def test_no_update_is_a_failure(data_bin, tmp_path):
    result = train_in_two(data_bin, tmp_path, "--max-update", "4", "--stop-min-lr", "1")
    assert result.returncode != 0
    assert "train_distributed.sh: no update was made" in result.stdout


@pytest.mark.long
def test_a_process_that_dies_takes_the_training_down(data_bin, tmp_path):
    plugin = tmp_path / "dying"
    plugin.mkdir()
    text = "import os\nimport fairseq_flash\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), {})\n"
    (plugin / "__init__.py").write_text(text.format(int(signal.SIGKILL)))
    result = train_in_two(data_bin, tmp_path / "out", "--max-update", "4", "--user-dir", plugin)
    assert result.returncode != 0


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_or_hangs_at_work_ends_the_training(data_bin, tmp_path, sent, rank):
    """Within TIMEOUT, and the 30 seconds that torchrun gives those that it ends."""
    words = [
        *arguments(data_bin, tmp_path / "save"),
        "--max-update",
        "100000",
        "--save-interval-updates",
        "5",
    ]
    command = [DISTRIBUTED, "--nproc", "2", *words]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    environment["TIMEOUT"] = "10"
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (tmp_path / "save" / "checkpoint_last.pt").exists(), seconds=120)
        (hit,) = [pid for pid in processes_of(tmp_path) if f"RANK={rank}" in environment_of(pid)]
        os.kill(hit, sent)
        assert process.wait(80) != 0
    finally:
        process.kill()
    wait_until(lambda: not processes_of(tmp_path), seconds=20)
    torch.load(tmp_path / "save" / "checkpoint_last.pt")


def environment_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")


@pytest.mark.long
def test_an_interrupt_ends_every_process(data_bin, tmp_path):
    words = arguments(data_bin, tmp_path / "a folder")
    command = [DISTRIBUTED, "--nproc", "2", *words, "--max-update", "100000"]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (tmp_path / "a folder").exists(), seconds=60)
        assert len(processes_of(tmp_path)) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    finally:
        process.terminate()
        process.wait(60)
    wait_until(lambda: not processes_of(tmp_path), seconds=20)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def processes_of(folder):
    """Numbers of the running processes that name ``folder`` on their command line."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [int(pid) for pid, status, words in rows if str(folder) in words and "Z" not in status]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "two", "data"], "--nproc is 'two'; allowed are whole numbers from 1"),
        (["--nproc", "2"], "no arguments for fairseq-train"),
        (["--nproc"], "--nproc needs a number of processes"),
    ],
)
def test_a_wrong_call_is_explained(words, message):
    result = run([DISTRIBUTED, *words], VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert result.returncode == 2
    assert message in result.stdout


def test_help_says_how_to_call_it():
    result = run([DISTRIBUTED, "--help"])
    assert result.returncode == 0
    assert result.stdout.startswith("Usage:")


def test_a_wrong_timeout_is_explained():
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    result = run([DISTRIBUTED, "--nproc", "2", "data"], VIRTUAL_ENV=sys.prefix, PATH=path, TIMEOUT="soon")
    assert result.returncode == 2
    assert "TIMEOUT is 'soon'; allowed are whole numbers from 1, of seconds" in result.stdout


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2)])
def test_the_worker_says_what_it_is_where_torchrun_did_not_start_it(words, status):
    result = run(["python", DISTRIBUTED.with_name("runs") / "worker.py", *words])
    assert result.returncode == status
    assert "One process of scripts/train_distributed.sh" in result.stdout


@pytest.fixture
def train_worker(monkeypatch):
    monkeypatch.syspath_prepend(str(DISTRIBUTED.parent))
    return importlib.import_module("runs.worker")


@pytest.fixture
def distributed_arguments(train_worker):
    return train_worker.distributed_arguments


ENVIRONMENT = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_gpus_get_nccl_and_a_device_each(distributed_arguments):
    words = " ".join(distributed_arguments(["data"], ENVIRONMENT, 2))
    assert "--distributed-rank 3 --distributed-world-size 4" in words
    assert "--distributed-backend nccl --device-id 1" in words
    assert "--ddp-backend" not in words


@pytest.mark.parametrize(("user", "gpus"), [(["data"], 0), (["data", "--cpu"], 8)])
def test_cpus_get_gloo_and_the_backend_that_runs_there(distributed_arguments, user, gpus):
    words = " ".join(distributed_arguments(user, ENVIRONMENT, gpus))
    assert "--distributed-backend gloo --ddp-backend legacy_ddp" in words
    assert "--device-id" not in words


@pytest.mark.parametrize(
    ("user", "gpus", "message"),
    [
        (["--distributed-world-size", "2"], 2, "--distributed-world-size is set by train_distributed.sh"),
        (
            ["--ddp-backend=pytorch_ddp"],
            0,
            "--ddp-backend is pytorch_ddp; on CPUs allowed: legacy_ddp, no_c10d",
        ),
        (["data"], 1, "--nproc is 2; allowed are 1 to 1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(distributed_arguments, user, gpus, message):
    with pytest.raises(ValueError, match=message):
        distributed_arguments(user, ENVIRONMENT, gpus)


@pytest.mark.parametrize(
    ("first", "last", "epoch", "processes", "objection"),
    [
        (0, 4, 1, 2, None),
        (4, 4, 1, 2, None),  # restored at --max-update
        (2, 2, 4, 2, None),  # restored after --max-epoch
        (2, 2, 3, 2, "no update was made: training stands at 2"),
        (0, 4, 1, 1, "fairseq trained with 1 of 2 processes"),
    ],
)
def test_only_work_done_now_or_before_counts(train_worker, first, last, epoch, processes, objection):
    limits = SimpleNamespace(max_update=4, max_epoch=3)
    record = train_worker.TrainingRecord()
    record.trainer = SimpleNamespace(
        data_parallel_world_size=processes,
        cfg=SimpleNamespace(optimization=limits),
        get_num_updates=lambda: last,
    )
    record.first_update, record.first_epoch = first, epoch
    found = record.objection(2)
    assert found is None if objection is None else found.startswith(objection)


def test_a_run_without_a_trainer_is_no_training(train_worker):
    assert train_worker.TrainingRecord().objection(2) == "fairseq-train ended before it built a trainer"
