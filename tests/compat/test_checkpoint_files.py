"""Proves that a file which is no whole checkpoint is refused in one sentence, before it takes memory."""

import pickle

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_flash._compat import dry_run
from support import hostile


def refusals(files):
    """By name: what is said of each file, or the exception that says too little."""
    said = {}
    for name, path in files.items():
        with hostile.little_memory():
            try:
                checkpoint_utils.load_checkpoint_to_cpu(str(path))
                said[name] = "loaded"
            except (ValueError, pickle.UnpicklingError) as error:
                said[name] = str(error)
            except BaseException as error:
                said[name] = repr(error)
        if not said[name].startswith(f"checkpoint {str(path)!r}"):
            continue
        if "\n" not in said[name] and "weights_only" not in said[name] and len(said[name]) < 600:
            said[name] = ""
    return {name: text for name, text in said.items() if text}


def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(checkpoint, tmp_path):
    assert refusals(hostile.malformed(checkpoint, tmp_path)) == {}


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    assert refusals(hostile.damaged(checkpoint, tmp_path)) == {}


def test_a_small_checkpoint_that_asks_for_gigabytes_is_refused(checkpoint, tmp_path):
    assert refusals(hostile.hungry(checkpoint, tmp_path)) == {}


def test_no_code_runs_from_either_format(checkpoint, tmp_path):
    marker = tmp_path / "ran"
    assert refusals(hostile.coded(checkpoint, tmp_path, marker)) == {}
    assert not marker.exists()


def test_every_bit_that_is_flipped_is_found_or_changes_nothing(checkpoint, tmp_path):
    good = torch.load(checkpoint)["model"]
    size = checkpoint.stat().st_size
    changed = []
    for position in range(0, size, size // 97):
        path = hostile.flipped(checkpoint, tmp_path / "flipped.pt", position)
        try:
            loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]
        except ValueError:
            continue
        if any(not torch.equal(loaded[name], weight) for name, weight in good.items()):
            changed.append(position)
    assert changed == []


@pytest.mark.parametrize("new_format", [True, False])
def test_a_whole_checkpoint_is_read_as_torch_reads_it(checkpoint, tmp_path, new_format):
    path = hostile.changed(
        checkpoint, tmp_path / "same.pt", lambda state: None, _use_new_zipfile_serialization=new_format
    )
    found = checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]
    good = torch.load(checkpoint)["model"]
    assert found.keys() == good.keys()
    assert all(torch.equal(found[name], weight) for name, weight in good.items())


def test_every_type_that_a_state_may_hold_passes(checkpoint, tmp_path):
    shared = torch.ones(3)
    values = {
        "types": [
            torch.ones(2, dtype=dtype) for dtype in (torch.half, torch.bfloat16, torch.long, torch.bool)
        ],
        "new types": torch.ones(2, dtype=torch.float8_e5m2),
        "bytes": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "shared": [shared, shared.view(3, 1), shared[1:]],
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(1.0),
        "strided": torch.ones(3, 4).t(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "plain": [1, -1, 2**70, 1.5, None, True, "é", b"bytes", (1,), {1, 2}, {"a": 1}, 1j],
        "device": [torch.device("cpu"), torch.float32, torch.Size([1, 2])],
    }
    path = hostile.changed(checkpoint, tmp_path / "rich.pt", lambda s: s["extra_state"].update(values))
    found = checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]
    assert found["plain"] == values["plain"]
    assert found["device"] == values["device"]
    assert torch.equal(found["strided"], values["strided"])


def test_an_archive_without_checksums_is_read(checkpoint, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = hostile.changed(checkpoint, tmp_path / "without.pt", lambda state: None)
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]


def test_a_class_that_the_user_lists_passes(checkpoint, tmp_path):
    path = hostile.changed(
        checkpoint,
        tmp_path / "listed.pt",
        lambda state: state["extra_state"].update(own=hostile.Call(bytearray, 3)),
    )
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.bytearray"):
        dry_run.examine(path)
    with torch.serialization.safe_globals([bytearray]):
        assert checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]["own"] == bytearray(3)


def test_infinite_weights_are_said(checkpoint, tmp_path, caplog):
    def change(state):
        hostile.weight_of(state).view(-1)[0] = torch.inf

    path = hostile.changed(checkpoint, tmp_path / "infinite.pt", change)
    checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "holds infinite numbers in decoder." in caplog.text
