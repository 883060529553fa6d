"""Proves that the comparison plans, resumes, records failures and chooses rates as it says."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare_lm
import compare_masked_lm
import compare_translation
from runs import lm_comparison, process, schedule
from support import tools
from support.tools import rows_of

#: Stands for fairseq's tools: the loss depends on the rate alone, and lies lowest at 2e-3.
FAKE = """
import json, math, os, pathlib, sys, time, zipfile
tool, *words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
if tool == "eval_lm":
    with zipfile.ZipFile(option("--path")) as archive:
        bits = float(archive.read("loss"))
    print("| INFO | Evaluated 2,000 tokens in 1.0s (2000.00 tokens/s)")
    print(f"| INFO | Loss (base 2): {bits:.4f}, Perplexity: {2 ** bits:.2f}")
    sys.exit()
folder, updates = pathlib.Path(option("--save-dir")), int(option("--max-update"))
arch, rate, n = option("--arch"), float(option("--lr")), option("--tokens-per-sample")
with (folder.parent / "calls").open("a") as calls:
    calls.write(json.dumps([os.getpid(), arch, rate, int(n), int(option("--seed")), updates]) + "\\n")
if (folder.parent / f"fail {arch}").exists():
    sys.exit("RuntimeError: told to fail")
if updates != 3 and (folder.parent / f"wait {arch}").exists():
    time.sleep(600)
bits = 5 + abs(math.log2(rate / 2e-3)) + int(option("--seed")) / 100
print("| INFO | fairseq_cli.train | num. shared model params: 4,000,000 (num. trained: 4,000,000)")
speed = 1200 if arch == "flash_lm_tiny" else 600
point = {"loss": str(bits), "wps": str(speed), "wpb": "64", "num_updates": str(updates)}
print("| INFO | train_inner |", json.dumps(point))
if "--disable-validation" not in words:
    print("| INFO | valid |", json.dumps({"valid_loss": "9", "valid_num_updates": str(updates)}))
with zipfile.ZipFile(folder / "checkpoint_last.pt", "w") as archive:
    archive.writestr("loss", str(bits))
"""
COUNTS = {"splits": {"valid": {"tokens": 2000, "words": 1000, "bytes": 5000}}}
OURS = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16", "--chunk-size", "8")


@pytest.fixture
def data(tmp_path):
    """A folder that looks like prepared data."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("dict.txt", "train.idx", "valid.idx"):
        (folder / name).touch()
    (folder / "prepare.json").write_text(json.dumps(COUNTS))
    return folder


@pytest.fixture
def compare(data, tmp_path, monkeypatch):
    """Runs a comparison in which a script stands for fairseq's tools; gives the rows of its CSV."""
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)

    def command(tool, *words):
        return [sys.executable, str(fake), tool, *map(str, words)]

    monkeypatch.setattr(schedule, "fairseq_command", command)
    monkeypatch.setattr(lm_comparison, "fairseq_command", command)
    monkeypatch.setattr(process.signal, "signal", lambda *args: None)

    def run(*words, extra=()):
        compare_lm.main(arguments(data, tmp_path, *words, extra=extra))
        return runs_of(tmp_path / "out.csv")

    calls = lambda: [json.loads(line) for line in (tmp_path / "runs" / "calls").open()]  # noqa: E731
    run.probes = lambda: [call for call in calls() if call[-1] in (3, 16)]
    run.calls = lambda: [call for call in calls() if call[-1] not in (3, 16)]
    run.folder = tmp_path / "runs"
    run.folder.mkdir()
    return run


def arguments(data, folder, *words, extra=()):
    base = ["--data", data, "--output", folder / "out.csv", "--folder", folder / "runs", "--device", "cpu"]
    base += ["--tokens-per-update", 64, "--tokens-per-sample", "16", "--budget", "640tokens"]
    base += ["--systems", "transformer_lm,flash_lm", *words]
    return [str(word) for word in [*base, *(["--", *extra] if extra else [])]]


def runs_of(path):
    """The records of a comparison but for those that only tell a speed."""
    return [row for row in rows_of(path) if row["stage"] != "speed"]


def test_each_system_trains_with_the_rate_that_was_best_for_it(compare):
    rows = compare("--lr", "flash_lm=8e-3", "--seeds", "1,2", "--lr-grid", "1e-3,2e-3,4e-3")
    rates = [(row["name"], row["lr"], row["budget"]) for row in rows if row["stage"] == "rate"]
    assert rates == [("transformer_lm", rate, "160tokens") for rate in ("0.001", "0.002", "0.004")]
    final = [(row["name"], row["lr"], row["seed"], row["updates"]) for row in rows if row["stage"] == "final"]
    systems = (("transformer_lm", "0.002"), ("flash_lm", "0.008"))
    assert final == [(*system, seed, "10") for seed in "12" for system in systems]


def test_a_row_tells_the_evaluation_and_every_way_to_count_it(compare, tmp_path):
    row = compare("--lr", "flash_lm=2e-3", "--systems", "flash_lm")[0]
    bits = 5.01
    assert float(row["valid_loss"]) == pytest.approx(bits * 0.693147, rel=1e-4)
    assert float(row["valid_perplexity"]) == pytest.approx(2**bits, rel=1e-4)
    assert float(row["bits_per_byte"]) == pytest.approx(bits * 2000 / 5000, rel=1e-4)
    assert float(row["byte_perplexity"]) == pytest.approx(2 ** (bits * 2000 / 5000), rel=1e-4)
    assert float(row["word_perplexity"]) == pytest.approx(2 ** (bits * 2000 / 1000), rel=1e-4)
    known = {"parameters": "4000000", "tokens": "640", "tokens_per_second": "1200", "valid_tokens": "2000"}
    assert {name: row[name] for name in known} == known
    assert row["python"].startswith("3.")
    assert all(
        row[name] for name in ("commit", "date", "torch", "fairseq", "threads", "seconds", "peak_memory")
    )
    (probe,) = [row for row in rows_of(tmp_path / "out.csv") if row["stage"] == "speed"]
    assert (probe["budget"], probe["valid_loss"]) == ("3updates", "")
    splits = {row["split"]: row["tokens"] for row in rows_of(tmp_path / "out_curves.csv")}
    assert splits == {"train": "640", "valid": "640"}


def test_minutes_become_as_many_updates_as_a_system_can_make(compare):
    compare(
        "--budget", "1minutes", "--lr", "flash_lm=2e-3,transformer_lm=2e-3", "--tokens-per-sample", "16,32"
    )
    updates = {(arch, n): updates for _, arch, _, n, _, updates in compare.calls()}
    assert [call[-1] for call in compare.probes()] == [16] * 4
    assert updates[("flash_lm_tiny", 16)] == updates[("flash_lm_tiny", 32)] == 60 * 1200 / 64
    assert updates[("transformer_lm", 16)] == -(-60 * 600 // 64)


def test_finished_runs_are_not_repeated_and_other_settings_are_other_runs(compare):
    lr = ("--lr", "flash_lm=2e-3,transformer_lm=2e-3")
    first = compare(*lr)
    assert compare(*lr) == first
    assert len(compare.calls()) == 2
    more = compare(*lr, "--seeds", "1,2")
    assert more[:2] == first
    assert len(more) == 4
    assert len(compare(*lr, extra=("--dropout", "0.1"))) == 6


def test_all_but_fairseqs_own_models_are_compiled(data, tmp_path):
    _, plan = compare_lm.parse(arguments(data, tmp_path, extra=("--compile", "--optimizer", "fused_adam")))
    ours, theirs = (plan.words(name, 16, {}, {}) for name in ("flash_lm", "transformer_lm"))
    assert ours[-3:] == ["--compile", "--optimizer", "fused_adam"]
    assert theirs[-2:] == ["--optimizer", "fused_adam"]
    assert "--compile" not in theirs
    reading, theirs = (plan.evaluation_command(x, 16, tmp_path / "x") for x in ("flash_lm", "transformer_lm"))
    assert reading[reading.index("--model-overrides") + 1] == "{'compile': False}"
    assert "--model-overrides" not in theirs


@pytest.mark.parametrize(
    ("on_gpu", "extra", "told"), [(True, [], 1), (True, ["--compile"], 0), (False, [], 0)]
)
def test_on_a_gpu_it_is_said_that_nothing_is_compiled(data, tmp_path, on_gpu, extra, told):
    _, plan = compare_lm.parse(arguments(data, tmp_path))
    plan = dataclasses.replace(plan, on_gpu=on_gpu, extra=extra)
    assert sum("not compiled" in line for line in plan.told()) == told


def test_runs_of_which_another_part_was_evaluated_are_other_runs(compare, capsys):
    words = ("--lr", "flash_lm=2e-3", "--systems", "flash_lm")
    part = compare(*words, "--eval-shards", "4")
    assert "all this on one block in 4 of the split valid" in capsys.readouterr().out
    whole = compare(*words)
    assert len(whole) == 2
    assert whole[0] == part[0]
    assert compare(*words, "--eval-shards", "4") == whole


def test_runs_that_begin_anew_as_their_data_have_changed_are_told(compare, data, capsys):
    words = ("--lr", "flash_lm=2e-3", "--systems", "flash_lm")
    compare(*words)
    assert "begin anew" not in capsys.readouterr().out
    (data / "test.idx").write_text("a split more")
    assert len(compare(*words)) == 2
    told = r"out.csv has records of data-\w{8}, none of data-\w{8}: these runs begin anew$"
    assert len(re.findall(told, capsys.readouterr().out, re.MULTILINE)) == 1
    compare(*words)
    assert "begin anew" not in capsys.readouterr().out


def test_a_failed_run_is_a_row_and_no_stop(compare, tmp_path):
    (compare.folder / "fail transformer_lm").touch()
    lr = ("--lr", "flash_lm=2e-3,transformer_lm=2e-3")
    report = tmp_path / "report.md"
    failed, fine = compare(*lr, "--report", report)
    assert failed["status"].startswith("error: status 1: RuntimeError: told to fail")
    assert failed["valid_loss"] == ""
    assert fine["status"] == "ok"
    assert "told to fail" in report.read_text().partition("## Runs that failed")[2]
    (compare.folder / "fail transformer_lm").unlink()
    assert len(compare(*lr)) == 2
    assert [row["status"] for row in compare(*lr, "--retry")] == ["ok", "ok"]


def test_a_system_whose_rates_all_failed_is_a_row_too(compare):
    (compare.folder / "fail transformer_lm").touch()
    rows = compare("--lr-grid", "1e-3,2e-3")
    assert [row["status"][:5] for row in rows if row["stage"] == "final"] == ["error", "ok"]


def test_a_training_that_had_ended_is_only_measured(compare, monkeypatch, capsys):
    words = ("--systems", "flash_lm", "--lr", "flash_lm=2e-3")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm_comparison, "evaluated", killed)
        with pytest.raises(SystemExit):
            compare(*words)
    assert len(compare.calls()) == 1
    (row,) = compare(*words)
    assert (row["status"], row["updates"]) == ("ok", "10")
    assert int(row["peak_memory"]) > 0
    assert len(compare.calls()) == 1, "trained again, by an update too many"
    assert compare(*words) == [row]
    assert "1 of 1 runs are done already" in capsys.readouterr().out


def test_the_plan_and_the_time_it_takes_are_said_before_it_starts(compare, capsys):
    words = ("--systems", "transformer_lm,flash_lm,transformer_pp_lm", "--lr-grid", "1e-3,2e-3")
    compare(*words, "--lr", "transformer_lm=2e-3", "--seeds", "1,2", "--tokens-per-sample", "16,32")
    said = capsys.readouterr().out
    plan, _, rest = said.partition("measurements of speed")
    assert "rates 0.001, 0.002 of flash_lm, transformer_pp_lm: 2 x 2 runs of 160tokens" in plan
    assert "final: 3 systems x 2 lengths x 2 seeds, runs of 640tokens, evaluated on the whole split" in plan
    # 15 s to start, the tokens, and 6 times the split forward alone, at 600 and 1200 tokens a second
    forward = 6 * 2000 / 3
    slow, fast = ((15 + (640 + forward) / speed) for speed in (600, 1200))
    tries = sum(15 + (160 + forward) / speed for speed in (600, 1200)) * 2
    minutes = round((8 * slow + 4 * fast + tries) / 60)
    assert f"about {minutes} min for 16 runs\n" in rest
    assert re.search(r"^8 of 16 runs done, about \d+ s left$", rest, re.MULTILINE), rest
    compare(*words, "--lr", "transformer_lm=2e-3", "--seeds", "1,2,3", "--tokens-per-sample", "16,32")
    assert "for 6 of 22 runs that are left" in capsys.readouterr().out


def test_the_end_is_a_table_and_the_answer(compare, capsys, tmp_path):
    report = tmp_path / "report.md"
    words = ("--lr", "flash_lm=2e-3", "--lr-grid", "4e-3,8e-3", "--seeds", "1,2", "--report", report)
    compare(*words)
    said = capsys.readouterr().out
    assert re.search(r"^transformer_lm +0.004 +2 +4.169 \(4.166 to 4.173\)", said, re.MULTILINE), said
    (sentence,) = re.findall(r"^In rows of 16 tokens .*$", said, re.MULTILINE)
    assert sentence.startswith("In rows of 16 tokens flash_lm is better than transformer_lm by 0.693 nats")
    assert "(perplexity 50 % lower; proven by 2 seeds, " in sentence
    assert "all this on the whole split valid (2,000 tokens)" in sentence
    assert sentence.endswith(
        "the best rate of transformer_lm, 0.004, is at the edge of what was tried: another may be better."
    )
    assert report.read_text().splitlines()[2] == f"**{sentence}**"


def test_results_go_to_the_folder_that_one_is_in(compare, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, plan = compare_lm.parse(["--data", str(data), "--device", "cpu"])
    assert plan.output == tmp_path / "comparison" / "comparison.csv"
    assert options.folder is None
    for module, name in ((compare_masked_lm, "masked_lm"), (compare_translation, "translation")):
        (data / "prepare.json").touch()
        options = module.parse(["--data", str(data)])
        assert options.output.resolve() == tmp_path / "comparison" / f"{name}.csv"
        assert options.folder == tmp_path / "comparison" / f"{name}_runs"


@pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent on Linux alone")
@pytest.mark.parametrize("victim", ["training", "comparison", "interrupt"])
def test_a_kill_loses_nothing_and_leaves_nothing(compare, data, tmp_path, victim):
    (compare.folder / "wait transformer_lm").touch()
    command = arguments(data, tmp_path, "--systems", "flash_lm,transformer_lm")
    command += ["--lr", "flash_lm=2e-3,transformer_lm=2e-3"]
    code = f"""
import sys; sys.path[:0] = [{str(tools.REPOSITORY / "scripts")!r}, {str(tools.REPOSITORY)!r}]
import compare_lm; from runs import lm_comparison, process, schedule
fake = lambda tool, *words: [sys.executable, {str(tmp_path / "fake.py")!r}, tool, *map(str, words)]
schedule.fairseq_command = lm_comparison.fairseq_command = fake
compare_lm.main({command!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: (compare.folder / "calls").exists() and len(compare.calls()) == 2)
            child = compare.calls()[1][0]
            (compare.folder / "wait transformer_lm").unlink()
            if victim == "training":
                os.kill(child, signal.SIGKILL)
            else:
                process.send_signal(signal.SIGKILL if victim == "comparison" else signal.SIGINT)
            status = process.wait(timeout=60)
        finally:
            process.kill()
    assert status == {"training": 0, "comparison": -signal.SIGKILL, "interrupt": 130}[victim]
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    rows = runs_of(tmp_path / "out.csv")
    assert [row["status"][:16] for row in rows] == ["ok", "error: status -9"][
        : 2 if victim == "training" else 1
    ]
    with (tmp_path / "out.csv").open("a") as stream:
        stream.write("torn,li")
    again = compare("--systems", "flash_lm,transformer_lm", "--lr", "flash_lm=2e-3,transformer_lm=2e-3")
    assert again[0] == rows[0]
    assert [(row["name"], row["status"]) for row in again] == [("flash_lm", "ok"), ("transformer_lm", "ok")]
    assert len(compare.calls()) == 3


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_several_jobs_make_the_same_rows(compare):
    rows = compare("--lr", "flash_lm=2e-3,transformer_lm=2e-3", "--seeds", "1,2", "--jobs", "3")
    assert sorted((row["name"], row["seed"]) for row in rows) == [
        (name, seed) for name in ("flash_lm", "transformer_lm") for seed in "12"
    ]
    assert {row["jobs"] for row in rows} == {"3"}


def test_data_of_another_tool_has_no_counts_and_that_is_said(compare, data, capsys):
    (data / "prepare.json").unlink()
    row = compare("--lr", "flash_lm=2e-3", "--systems", "flash_lm")[0]
    assert "has no prepare.json: perplexities per byte and per word are left empty" in capsys.readouterr().out
    assert row["valid_perplexity"]
    assert row["bits_per_byte"] == row["byte_perplexity"] == row["word_perplexity"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "5hours"), "'5hours' is not allowed; allowed: such as 1000000tokens"),
        (
            ("--systems", "flash_lm,my_lm"),
            "--systems my_lm is unknown in --size tiny; allowed: flash2_lm, flash_global_lm",
        ),
        (("--systems", "flash_lm,flash_lm"), "names flash_lm twice"),
        (
            ("--tokens-per-sample", "48"),
            "--tokens-per-update 64 with --max-tokens 64 is not allowed for rows of 48",
        ),
        (("--max-tokens", "48"), "with --max-tokens 48 is not allowed for rows of 16"),
        (("--lr", "my_lm=1"), "--lr names my_lm; allowed: transformer_lm, flash_lm"),
        (("--lr", "flash_lm"), "argument --lr: invalid rates value: 'flash_lm'"),
        (("--seeds", "1,1"), "invalid list of positive, different numbers value: '1,1'"),
        (
            ("--report", "report.pdf"),
            "--report report.pdf is not allowed; allowed: a name that ends in .html or .md",
        ),
        (("--data", "/nowhere"), "--data /nowhere has no dict.txt, train.idx, valid.idx; allowed"),
        (("--lr-budget", "1minutes"), "--lr-budget 1minutes is not allowed; allowed: tokens, as --budget"),
        (("--jobs", "0"), "--jobs 0 is not allowed; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(compare, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        compare(*words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_data(text_folder, tmp_path_factory):
    """Real text, prepared by the script."""
    folder = tmp_path_factory.mktemp("real")
    for name in ("train", "valid"):
        tools.write_texts(folder / "text" / name, text=(text_folder / name).read_text().splitlines())
    prepare = tools.REPOSITORY / "scripts" / "prepare_lm.py"
    words = ("--text", folder / "text", "--output", folder / "bin", "--vocab-size", "400")
    prepared = tools.run("python", prepare, *words)
    assert prepared.returncode == 0, prepared.stdout
    return folder / "bin"


def real(data, folder, *words, extra=()):
    """The command line of a comparison by fairseq's own tools."""
    script = str(tools.REPOSITORY / "scripts" / "compare_lm.py")
    return [sys.executable, script, *arguments(data, folder, *words, extra=extra)]


def check_bits_per_byte(row, data):
    counts = json.loads((data / "prepare.json").read_text())["splits"]["valid"]
    bits = float(row["valid_loss"]) / math.log(2)
    assert 2 < bits < math.log2(500)
    assert row["valid_tokens"] == str(counts["tokens"])
    expected = bits * counts["tokens"] / counts["bytes"]
    assert float(row["bits_per_byte"]) == pytest.approx(expected, rel=1e-3)


def test_the_real_tools_train_evaluate_and_go_on_after_a_kill(real_data, tmp_path):
    words = ("--lr", "flash_lm=2e-3", "--budget", "20updates", "--keep", "--systems", "flash_lm")
    report = tmp_path / "report.html"
    command = real(real_data, tmp_path, *words, "--report", report, extra=OURS)
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone
    ) as process:
        wait_until(lambda: any((tmp_path / "runs").glob("*/checkpoint_last.pt")), seconds=120)
        process.kill()
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = runs_of(tmp_path / "out.csv")
    assert (row["updates"], row["status"]) == ("20", "ok")
    check_bits_per_byte(row, real_data)
    log = next((tmp_path / "runs").glob("flash_lm-final*/train.log")).read_text()
    assert "Loaded checkpoint" in log, "the killed training began anew"
    assert "data:image/png;base64," in report.read_text()


@pytest.mark.long
def test_default_systems_of_tiny_size_are_compared_by_the_real_tools(real_data, tmp_path):
    words = ("--systems", compare_lm.SYSTEMS, "--budget", "3updates", "--lr-grid", "2e-3")
    done = subprocess.run(real(real_data, tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in rows_of(tmp_path / "out.csv") if row["stage"] == "final"]
    assert [(row["name"], row["status"]) for row in rows] == [
        (s, "ok") for s in compare_lm.SYSTEMS.split(",")
    ]
    for row in rows:
        check_bits_per_byte(row, real_data)


def test_a_command_to_read_has_no_path_of_this_machine(tmp_path):
    data = tmp_path / "my data"
    words = ("fairseq-train", data, "--user-dir", tools.REPOSITORY / "fairseq_flash", "--lr", 1)
    found = schedule.readable(words, {data: "my data"})
    assert found == "fairseq-train 'my data' --user-dir fairseq_flash --lr 1"
