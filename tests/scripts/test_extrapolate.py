"""Proves that the loss by position is that of every row on its own, whatever the batch."""

import re

import pytest
import torch
from fairseq import checkpoint_utils

import extrapolate
from runs import reading
from support import tools


@pytest.fixture(scope="module")
def checkpoint(data_bin, tmp_path_factory):
    """A checkpoint of two updates."""
    folder = tmp_path_factory.mktemp("extrapolate")
    tools.train(data_bin, folder, updates=2)
    return (folder / "checkpoint_last.pt").rename(folder / "ours.pt")


def rows_of(path):
    return {(int(row["n"]), row["positions"]): row for row in tools.rows_of(path)}


def test_the_loss_by_position_is_that_of_each_row_alone(data_bin, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "TOKENS_PER_BATCH", 48)
    output = tmp_path / "out.csv"
    words = ["--data", str(data_bin), "--checkpoints", str(checkpoint), "--split", "valid", "--device", "cpu"]
    extrapolate.main([*words, "--lengths", "8", "20", "--output", str(output)])
    rows = rows_of(output)
    assert list(rows) == [(8, "all"), (8, "0-8"), (20, "all"), (20, "0-8"), (20, "8-16"), (20, "16-20")]
    tokens, _ = reading.read_tokens(data_bin, "valid")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    expected = []
    for begin in range(0, len(tokens) - 20, 20):
        row = tokens[begin : begin + 21].long()
        with torch.no_grad():
            logits = model.eval()(row[None, :-1])[0][0]
        expected.append(-logits.log_softmax(dim=-1).gather(1, row[1:, None]).squeeze(1))
    expected = torch.stack(expected)
    for name, stretch in extrapolate.stretches(20, 8):
        assert float(rows[20, name]["loss"]) == pytest.approx(expected[:, stretch].mean().item(), abs=1e-4)
        assert int(rows[20, name]["tokens"]) == expected[:, stretch].numel()
    before = output.read_bytes()
    extrapolate.main([*words, "--lengths", "8", "20", "--output", str(output)])
    assert output.read_bytes() == before


def words_of(data_bin, folder):
    """The words that read a folder's last checkpoint on a CPU."""
    checkpoint = folder / "checkpoint_last.pt"
    return ["--data", str(data_bin), "--checkpoints", str(checkpoint), "--device", "cpu"]


def test_a_row_beyond_a_table_is_a_row_with_the_error(data_bin, tmp_path):
    kind = ("--attention", "quadratic", "--relative-bias", "toeplitz")
    tools.train(data_bin, tmp_path, *kind, updates=1)
    output = tmp_path / "out.csv"
    words = words_of(data_bin, tmp_path)
    extrapolate.main([*words, "--split", "valid", "--lengths", "32", "64", "--output", str(output)])
    rows = rows_of(output)
    assert rows[32, "all"]["status"] == "ok"
    assert "longer than the table" in rows[64, "all"]["status"]


def test_a_linear_branch_that_reads_otherwise_has_rows_of_its_own(data_bin, checkpoint, tmp_path):
    output = tmp_path / "out.csv"
    words = ["--data", str(data_bin), "--checkpoints", str(checkpoint), "--split", "valid", "--device", "cpu"]
    for change in ((), ("--linear-window", "1"), ("--linear-window", "2", "--plain-linear")):
        extrapolate.main([*words, *change, "--lengths", "16", "32", "--output", str(output)])
    found = {(row["name"], row["n"], row["positions"]): row["loss"] for row in tools.rows_of(output)}
    names = ["ours", "ours, window 1", "ours, window 2, plain linear"]
    assert list(dict.fromkeys(name for name, _, _ in found)) == names
    # Chunks have 8 tokens: two are within a window of one, four are not.
    assert found["ours", "16", "all"] == found["ours, window 1", "16", "all"]
    with pytest.raises(SystemExit):
        extrapolate.main([*words, "--linear-window", "0", "--output", str(output)])


@pytest.mark.parametrize("command", ["extrapolate", "yardsticks"])
@pytest.mark.parametrize("words", [("--data", "/none"), ("--split", "none")])
def test_data_that_are_none_are_named(data_bin, checkpoint, capsys, command, words):
    main = tools.load_script(command).main
    with pytest.raises(SystemExit):
        main(["--data", str(data_bin), "--checkpoints", str(checkpoint), "--device", "cpu", *words])
    assert re.search(r"error: --data \S+ has no .*\.idx; allowed: ", capsys.readouterr().err)


def test_shifted_keys_and_a_fading_branch_are_read_otherwise_too(data_bin, tmp_path):
    small = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16", "--chunk-size", "8")
    tools.train(data_bin, tmp_path, "--arch", "flash2_lm_tiny", *small, updates=2)
    words = words_of(data_bin, tmp_path)
    words += ["--split", "valid", "--lengths", "32", "--output", str(tmp_path / "out.csv")]
    for change in ((), ("--plain-linear",), ("--linear-window", "2")):
        extrapolate.main([*words, *change])
    found = [row for row in tools.rows_of(tmp_path / "out.csv") if row["positions"] == "all"]
    assert [row["status"] for row in found] == ["ok"] * 3
    assert [row["name"].partition(", ")[2] for row in found] == ["", "plain linear", "window 2"]
