"""Proves that candidates are trained on the same rows, measured rightly, and each once."""

import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch

import candidates
import yardsticks
from ablation import candidate_training, candidate_yardsticks
from ablation.candidate_data import Recall, Text
from ablation.candidate_layers import Choice
from ablation.candidate_systems import Size, build, parse_system
from ablation.candidate_training import UNASKED, Recipe, batches, draw_chunk, open_stream, rows_of
from runs.reading import read_tokens
from support import tools

TINY = (
    *("--embed-dim", "32", "--layers", "2", "--attention-dim", "16", "--chunk-size", "8", "--device", "cpu"),
    *("--tokens-per-sample", "32", "--tokens-per-update", "128", "--tokens", "512", "--valid-tokens", "320"),
)
RECIPE = Recipe(1e-2, 1, 1024, 64, 32, "cpu", "float32", False)


@pytest.fixture
def command(data_bin, tmp_path):
    """Runs the command line in this process; its trainings are processes all the same."""
    paths = ("--data", data_bin, "--output", tmp_path / "found.csv", "--folder", tmp_path / "logs")

    def run(*words):
        candidates.main([*map(str, paths), *TINY, *map(str, words)])
        return tools.rows_of(tmp_path / "found.csv")

    return run


def test_the_stream_is_the_whole_text(data_bin):
    assert numpy.array_equal(open_stream(data_bin, "valid"), read_tokens(data_bin, "valid")[0].numpy())


def test_every_row_comes_once_and_overlaps_the_next_by_what_is_only_predicted():
    stream = numpy.arange(32 * 32 + 1, dtype=numpy.uint16)
    rows = torch.cat(list(batches(stream, RECIPE)))
    assert rows.shape == (32, 33)
    assert sorted(rows[:, 0].tolist()) == list(range(0, 1024, 32))
    assert torch.equal(rows - rows[:, :1], torch.arange(33).expand(32, 33))
    again = torch.cat(list(batches(stream, RECIPE._replace(tokens=2048))))
    assert torch.equal(again[:32], rows)
    assert sorted(again[32:, 0].tolist()) == sorted(rows[:, 0].tolist())
    other = torch.cat(list(batches(stream, RECIPE._replace(seed=2))))
    assert not torch.equal(other, rows)


def test_the_rate_goes_up_for_a_tenth_and_down_to_0():
    shares = [candidate_training._share(step, 20) for step in range(21)]
    assert shares[:3] == pytest.approx([0.5, 1, 1])
    assert shares[11] == pytest.approx(0.5)
    assert shares[20] == 0


def test_chunks_are_drawn_for_units_that_ask_for_it():
    blocks = [
        candidate_training.CandidateUnit(16, Choice(random_chunk=draws), attention_dim=4, chunk_size=64)
        for draws in (True, False)
    ]
    model = SimpleNamespace(stack=SimpleNamespace(blocks=blocks))
    drawn, found = candidate_training.random.Random(1), set()
    for _ in range(60):
        draw_chunk(model, drawn)
        found.add(blocks[0].current_chunk)
    assert found == {8, 16, 32, 64}
    assert blocks[1].current_chunk == 64
    draw_chunk(model, None)
    assert blocks[0].current_chunk == 64


class Copier:
    """Foresees what followed where this token stood before, up to ``reach`` tokens ago."""

    words = 1000

    def __init__(self, reach):
        self.reach, self.stack, self.rows = reach, self._features, []

    def eval(self):
        return self

    def _features(self, tokens):
        self.rows += [row for row in tokens]
        logits = torch.zeros(*tokens.shape, self.words)
        for b, row in enumerate(tokens.tolist()):
            last = {}
            for i, token in enumerate(row):
                if i - last.get(token, -math.inf) <= self.reach:
                    logits[b, i, row[last[token] + 1]] = 20.0
                last[token] = i
        return logits, None

    def output_layer(self, features):
        return features


def test_yardsticks_of_a_model_that_copies():
    # No token comes again within a row, but for those of a second copy.
    stream = numpy.arange(64 * 1000, dtype=numpy.int64) % 997
    recipe = RECIPE._replace(tokens_per_sample=64)
    found = candidate_yardsticks.measure(Copier(100), stream, recipe, tokens=640, chunk=8, longest=4)
    nothing = math.log(Copier.words)
    assert found["valid_loss"] == pytest.approx(nothing)
    assert found["tokens_by_distance"] == "0 0 0 640"
    assert (found["loss_near"], found["loss_new"]) == ("", pytest.approx(nothing))
    assert found["copy_gain_quarter"] == pytest.approx(nothing, abs=1e-3)
    assert found["copy_gain_end"] == pytest.approx(nothing, abs=1e-3)
    assert found["copy_over_other_end"] == pytest.approx(nothing, abs=1e-3)
    assert found["loss_4n"] == found["alone_4n"] == pytest.approx(nothing)
    assert "loss_16n" not in found
    near = candidate_yardsticks.measure(Copier(20), stream, recipe, tokens=640, chunk=8, longest=16)
    assert near["copy_gain_quarter"] == pytest.approx(nothing, abs=1e-3)
    assert near["copy_gain_end"] == pytest.approx(0, abs=1e-3)
    assert near["loss_16n"] == pytest.approx(nothing)


def test_a_second_copy_stands_at_its_distance():
    stream, model = numpy.arange(64 * 100, dtype=numpy.int64) % 997, Copier(0)
    recipe = RECIPE._replace(tokens_per_sample=64)
    for distance, length in ((8, 16), (16, 24), (56, 64)):
        model.rows.clear()
        candidate_yardsticks._copy_gains(model, stream, recipe, distance)
        assert len(model.rows) == 128
        for copied, alone in zip(model.rows[:64], model.rows[64:], strict=True):
            assert len(copied) == length - 1
            assert torch.equal(copied[:7], copied[distance : distance + 7])
            assert torch.equal(copied[8:], alone[8:])
            assert not torch.equal(copied[:8], alone[:8])


def test_the_last_quarter_of_long_rows_is_read_alone_as_well():
    stream, model = numpy.arange(64 * 100, dtype=numpy.int64) % 997, Copier(0)
    recipe = RECIPE._replace(tokens_per_sample=64)
    candidate_yardsticks._long_rows(model, stream, recipe, 16, 2)
    long, alone = model.rows[:2], model.rows[2:]
    assert [len(row) for row in long] == [1024, 1024]
    assert [len(row) for row in alone] == [64] * 8
    assert torch.equal(torch.cat(alone[:4]), long[0][-256:])


def test_losses_by_distance_are_told_apart():
    rows = torch.tensor([[5, 6, 5, 5, 7, 6]])
    assert candidate_yardsticks.distances(rows).tolist() == [[0, 2, 1, 0, 4]]


def test_trainings_are_records_and_resume(command, capsys):
    words = ("--systems", "flash+convzv+decay,flash,local", "--lr", "local=1e-2,flash=1e30,2e-2", "--jobs", 2)
    rows = {row["name"]: row for row in command(*words)}
    failed = rows.pop("flash")
    assert failed["status"].startswith("error: status 1: ValueError: the loss is ")
    assert {name: (row["lr"], row["status"]) for name, row in rows.items()} == {
        "flash+convzv+decay": ("0.02", "ok"),
        "local": ("0.01", "ok"),
    }
    for row in rows.values():
        for name in ("valid_loss", "loss_near", "loss_new", "copy_gain_end", "loss_4n", "alone_4n"):
            assert 0 <= abs(float(row[name])) < 6, name
        assert (row["updates"], row["n"], row["tokens"], row["d"]) == ("4", "32", "512", "32")
    assert "local 0.01 1: update 4/4" in capsys.readouterr().out
    assert {row["name"]: row for row in command(*words)} == {**rows, "flash": failed}
    assert "3 of 3 trainings are done already" in capsys.readouterr().out
    again = command(*words, "--retry")
    assert "2 of 3 trainings are done already" in capsys.readouterr().out
    assert {row["name"]: row["status"] for row in again}["flash"].startswith("error: status 1")
    assert len(again) == 3


class Rememberer(Copier):
    """Foresees what followed a word, as far back as it reaches."""

    words = 4 + 2 * 8


RECALL = Recall(pairs=3, gap=8, words=8, n=32)


def test_recall_asks_for_values_of_rows_that_are_new_and_the_same_for_all_systems():
    updates = list(RECALL.examples(RECIPE))
    assert len(updates) == RECIPE.updates
    rows = torch.cat([source for source, _ in updates])
    assert rows.shape == (RECIPE.updates * RECIPE.rows, 32)
    assert len(rows.unique(dim=0)) == len(rows)
    for source, targets in updates:
        assert targets.shape == source.shape == (RECIPE.rows, 32)
        for row, asked in zip(source.tolist(), targets.tolist(), strict=True):
            told = dict(zip(row[:6:2], row[1:6:2], strict=True))
            answers = {row[place]: value for place, value in enumerate(asked) if value != UNASKED}
            assert answers == told
    again = torch.cat([source for source, _ in RECALL.examples(RECIPE)])
    assert torch.equal(again, rows)
    other = torch.cat([source for source, _ in RECALL.examples(RECIPE._replace(seed=2))])
    assert not torch.equal(other, rows)


def test_accuracy_is_of_the_values_that_are_asked_for():
    found = RECALL.measure(Rememberer(32), RECIPE, tokens=640)
    assert (found["accuracy"], found["valid_loss"]) == (1, pytest.approx(0, abs=1e-6))
    # Every key lies farther behind than the gap.
    found = RECALL.measure(Rememberer(8), RECIPE, tokens=64000)
    assert found["accuracy"] == 0
    assert found["valid_loss"] == pytest.approx(math.log(Rememberer.words))


def test_recall_is_trained_without_a_text_and_has_a_table_of_its_own(command, capsys):
    words = ("--data", "recall", "--pairs", 3, "--recall-words", 8, "--lr", "1e-2")
    rows = command(*words, "--systems", "flash+delta,transformer_pp")
    assert [row["name"] for row in rows] == ["flash+delta", "transformer_pp"]
    for row in rows:
        assert (row["status"], row["data"]) == ("ok", "recall of 3 pairs, gap 8, 8 words")
        assert 0 <= float(row["accuracy"]) <= 1
        assert 0 < float(row["valid_loss"]) < 6
        assert "loss_far" not in row
    capsys.readouterr()
    # Other rows are another cell.
    assert len(command(*words, "--systems", "local", "--recall-gap", 16)) == 3
    defaults = candidates.parse(["--data", "recall", "--systems", "flash", "--lr", "1"])
    assert defaults.output.name == "candidates_recall.csv"
    assert defaults.recall_gap == defaults.chunk_size


def test_a_kept_model_is_read_by_the_yardsticks(command, data_bin, tmp_path):
    (row,) = command("--systems", "flash", "--lr", "1e-2", "--save-dir", tmp_path / "kept")
    data = ("--data", data_bin, "--split", "valid", "--device", "cpu", "--row", "32")
    (path,) = (tmp_path / "kept").glob("flash-0.01-1-*.pt")
    kept = ("--checkpoints", path, "--yardsticks", "recurrence")
    for window in ((), ("--linear-window", "1"), ("--plain-linear",)):
        words = (*data, *kept, *window, "--output", tmp_path / "read.csv")
        yardsticks.main([str(word) for word in words])
    whole, *changed = (
        float(row["loss"]) for row in tools.rows_of(tmp_path / "read.csv") if row["x"] == "all"
    )
    assert whole == pytest.approx(float(row["valid_loss"]), abs=1e-2)
    assert len({whole, *changed}) == 3


def test_a_cell_without_its_file_is_trained_once_more_and_no_file_is_of_two_cells(
    command, tmp_path, monkeypatch, capsys
):
    class Trained:
        status = 0

    def pretend(words, log, **unused):
        log.write_text(candidates.RESULT + '{"updates": 4}\n' if Trained.status == 0 else "broken\n")
        if "--save-dir" in words and Trained.status == 0:
            name = words[words.index("--worker") + 1]
            (tmp_path / "kept" / f"{name}.pt").write_text(words[words.index("--tokens") + 1])
        return Trained

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(candidates, "run", pretend)
    words = ("--systems", "flash", "--lr", "1e-2")
    command(*words)
    kept = (*words, "--save-dir", tmp_path / "kept")
    Trained.status = 1
    # A failure takes no result away, and is not tried again unasked.
    assert [row["status"] for row in command(*kept)] == ["ok", "error: status 1: broken"]
    capsys.readouterr()
    command(*kept)
    assert "1 of 1 trainings are done already" in capsys.readouterr().out
    Trained.status = 0
    assert [row["status"] for row in command(*kept, "--retry")] == ["ok"]
    assert "done already" not in capsys.readouterr().out
    command(*kept)
    assert "1 of 1 trainings are done already" in capsys.readouterr().out
    for more in (("--tokens", 1024), ("--embed-dim", 64), ("--dtype", "bfloat16")):
        command(*kept, *more)
    files = list((tmp_path / "kept").iterdir())
    assert sorted(path.read_text() for path in files) == ["1024", "512", "512", "512"]
    assert all(path.name.startswith("flash-0.01-1-") for path in files)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--systems", "flash,quad+conv", "--lr", "1"), "'conv' is not allowed with quad"),
        (("--systems", "flash", "--lr", "local=1"), "--lr local= is none of --systems flash"),
        (("--systems", "flash,local", "--lr", "local=1"), "--lr has None for flash"),
        (("--systems", "flash", "--lr", "-1"), "--lr -1 of flash is not allowed; allowed: above 0"),
        (("--systems", "flash", "--lr", "1", "--tokens-per-sample", "12"), "allowed: a multiple of 8"),
        (
            ("--systems", "flash", "--lr", "1", "--tokens-per-update", "100"),
            "allowed: a multiple of --tokens",
        ),
        (("--systems", "flash", "--lr", "1", "--data", "."), "has no train.bin and train.idx"),
        (("--systems", "flash", "--lr", "1", "--data", "recall"), "--tokens-per-sample 32 is not allowed"),
        (("--systems", "local,flash+l2", "--lr", "1", "--save-dir", "."), "--save-dir cannot keep flash+l2"),
        (
            ("--systems", "flash", "--lr", "1", "--data", "recall", "--save-dir", "x", "--pairs", "2"),
            "--save-dir cannot keep what recall trained",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(command, capsys, words, said):
    words = [f"--lr={words[3]}" if word == "--lr" else word for word in words if word != words[3]]
    with pytest.raises(SystemExit):
        command(*words)
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_an_interrupt_ends_all_trainings(data_bin, tmp_path):
    words = [sys.executable, tools.REPOSITORY / "scripts" / "candidates.py", "--data", data_bin, *TINY]
    words += ["--systems", "flash,local", "--lr", "1e-3", "--jobs", "2", "--tokens", "50000000"]
    words += ["--output", tmp_path / "found.csv", "--folder", tmp_path / "logs"]
    env, pipe = {**os.environ, "PYTHONPATH": str(tools.REPOSITORY)}, subprocess.PIPE
    child = subprocess.Popen([*map(str, words)], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env)
    for line in child.stdout:
        if "update 1/" in line:
            break
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    time.sleep(0.5)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(data_bin) not in "".join(line for line in left.splitlines() if "--worker" in line)


@pytest.mark.long
def test_compiled_layers_give_the_same_losses(data_bin):
    text, found = Text(data_bin), []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = build(parse_system("flash+conv+data"), Size(32, 2, 8, 16, 32), text.dictionary)
        if compiled:
            candidate_training.compile_layers(model)
        recipe = RECIPE._replace(tokens=512, compile=compiled)
        found.append(candidate_training.train(model, text.examples(recipe), recipe)["train_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_rows_hold_what_is_predicted():
    assert rows_of(numpy.arange(10, dtype=numpy.uint8), [0, 4], 3).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
