"""Proves that one command trains, reuses and resumes, whatever ends it, in any folder and environment."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

import quickstart

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SMALL = "--tokens-per-sample 64 --max-tokens 256 --layers 2 --embed-dim 64 --max-valid-steps 1"
# what stands in for pip, ruff, mypy and pytest: it only records how it was called
FAKE_MODULE = "import os, sys; open(os.environ['CALLS'], 'a').write(repr(sys.argv[1:]) + '\\n')\n"


#: Ends the command once the environment is there.
WRONG = ("--minutes", "-1")


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository's scripts under a path with spaces."""
    root = tmp_path / "a copy's root"
    shutil.copytree(SCRIPTS, root / "scripts", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture
def environment(tmp_path):
    """A virtual environment whose pip, ruff, mypy and pytest write their arguments to the file ``calls``."""
    folder = tmp_path / "an env"
    venv.create(folder, symlinks=True)
    _add_fakes(folder)
    return folder


def _add_fakes(folder):
    (packages,) = folder.glob("lib/python3*/site-packages")
    for name in ("pip", "ruff", "mypy", "pytest"):
        (packages / name).mkdir()
        (packages / name / "__main__.py").write_text(FAKE_MODULE)


def shell(script, *arguments, calls, expect=0, **variables):
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(
        ["bash", script, *arguments],
        env={**kept, "CALLS": str(calls), **{key: str(value) for key, value in variables.items()}},
        capture_output=True,
        text=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_active_environment_is_used_and_installed_only_after_a_change(copy, environment, tmp_path):
    calls, script = tmp_path / "calls", copy / "scripts" / "quickstart.sh"
    for _ in range(2):
        assert "--minutes -1" in shell(script, *WRONG, calls=calls, VIRTUAL_ENV=environment, expect=2)
    installed = calls.read_text().splitlines()
    assert len(installed) == 1
    assert f"'-c', \"{copy}/constraints.txt\", '-e', \"{copy}\"" in installed[0]
    assert not (copy / ".venv").exists()
    (copy / "constraints.txt").write_text("# changed\n")
    shell(script, *WRONG, calls=calls, VIRTUAL_ENV=environment, expect=2)
    assert len(calls.read_text().splitlines()) == 2


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_comes_at_once_and_installs_nothing(copy, tmp_path, word):
    calls = tmp_path / "calls"
    assert "--more M" in shell(copy / "scripts" / "quickstart.sh", "--text", "x", word, calls=calls)
    assert not calls.exists()
    assert not (copy / ".venv").exists()


def test_what_so_much_training_is_worth_is_said():
    few = quickstart.outlook(400_000, 12_000_000, 2000.0)
    assert few == (
        "400,000 tokens show that it works and are too few to judge by; 5,000,000, after which "
        "docs/results.md compares models, take --more 39"
    )
    small = quickstart.outlook(400_000, 120_000, 2000.0)
    assert small.endswith("so is a text of 120,000: give --text some megabytes")
    assert quickstart.outlook(5_000_000, 12_000_000, 2000.0).startswith("5,000,000 tokens are enough")


def test_it_validates_on_fewer_tokens_than_it_trains_on(tmp_path):
    words = quickstart.training_command(quickstart.Run(tmp_path), 3.0, [])
    option = dict(itertools.pairwise(words))
    trained, validated = (int(option[f"--{name}"]) for name in ("save-interval-updates", "max-valid-steps"))
    assert validated < trained / 2


def test_somebody_elses_torch_stays_as_it_is(copy, environment, tmp_path):
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "torch.py").write_text("")
    script = copy / "scripts" / "quickstart.sh"
    shell(script, *WRONG, calls=tmp_path / "calls", VIRTUAL_ENV=environment, expect=2)
    assert "constraints.txt" not in (tmp_path / "calls").read_text()


def test_without_an_environment_one_is_made(copy, environment, tmp_path):
    template = environment  # stands for a Python whose venv comes without a network
    interpreter = tmp_path / "my python"
    make = f'if [ "$2" = venv ]; then cp -R "{template}" "$4"; exit; fi'
    interpreter.write_text(f'#!/bin/sh\n{make}\nexec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)
    script = copy / "scripts" / "quickstart.sh"
    shell(script, *WRONG, calls=tmp_path / "calls", PYTHON=interpreter, expect=2)
    assert (copy / ".venv" / "bin" / "python").exists()
    assert "making the environment" not in shell(script, *WRONG, calls=tmp_path / "calls", expect=2)


def test_an_unsuitable_python_is_named(copy, tmp_path):
    script = copy / "scripts" / "quickstart.sh"
    assert "PYTHON=false" in shell(script, calls=tmp_path / "calls", PYTHON="false", expect=2)
    old = tmp_path / "old"
    (old / "bin").mkdir(parents=True)
    (old / "bin" / "python").symlink_to(shutil.which("false"))
    assert str(old) in shell(script, calls=tmp_path / "calls", VIRTUAL_ENV=old, expect=2)


def test_the_test_script_selects_and_passes_on(copy, environment, tmp_path):
    calls, script = tmp_path / "calls", copy / "scripts" / "test.sh"
    shell(script, "-k", "two words", calls=calls, VIRTUAL_ENV=environment, CI="true")
    shell(script, "--all", calls=calls, VIRTUAL_ENV=environment)
    pip, *first, chosen, lint, form, types, everything = calls.read_text().splitlines()
    assert f"{copy}[test]" in pip
    assert first == [lint, form, types] == ["['check']", "['format', '--check', '--quiet']", "[]"]
    assert re.fullmatch(r"\['-n', '\d+', '-m', 'not long', '-k', 'two words'\]", chosen)
    assert re.fullmatch(r"\['-n', '\d+'\]", everything)


@pytest.mark.parametrize("broken", ["ruff", "mypy", "pytest"])
def test_a_failure_is_the_test_scripts_status(copy, environment, tmp_path, broken):
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / broken / "__main__.py").write_text("raise SystemExit(5)")
    shell(copy / "scripts" / "test.sh", calls=tmp_path / "calls", VIRTUAL_ENV=environment, expect=5)


@pytest.fixture
def text(tmp_path):
    """A small text under a path with a space."""
    import pydoc_data.topics

    path = tmp_path / "my text.txt"
    pages = "\n".join(pydoc_data.topics.topics.values())
    path.write_text(pages[:50000])
    return path


def start(tmp_path, text, *own, interval=2):
    arguments = ["--text", text, "--folder", tmp_path / "re sults", "--vocab-size", 400, *own]
    arguments += ["--", *SMALL.split(), "--save-interval-updates", interval]
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "quickstart.py", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, expect=0):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == expect, output
    assert "Traceback" not in output
    return output


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


@pytest.mark.long
def test_a_second_run_reuses_and_more_goes_on(tmp_path, text):
    first = finish(start(tmp_path, text, "--minutes", 0.1))
    assert "$ fairseq-train" in first
    table = first[first.index("  valid perplexity") :]
    assert re.search(r"[\d.]+ per token, [\d.]+ bits per byte", table)
    assert re.search(r"speed +[\d,]+ tokens/s", table)
    for line in ("checkpoint", "TensorBoard log"):
        assert Path(re.search(rf"^  {line} +(/.*)$", table, re.MULTILINE)[1]).exists()
    second = finish(start(tmp_path, text))
    assert "fairseq-train" not in second
    assert "fairseq-eval-lm" not in second
    assert second[second.index("  valid perplexity") :] == table
    third = finish(start(tmp_path, text, "--more", 0.1))
    updates = [int(re.search(r"([\d,]+) updates", output)[1].replace(",", "")) for output in (first, third)]
    assert updates[1] > updates[0] > 0
    assert "0.2 minutes" in third


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_ended_run_resumes_where_it_was(tmp_path, text, number):
    process = start(tmp_path, text, "--minutes", 5)
    folder = tmp_path / "re sults"
    wait_for(lambda: list(folder.glob("*/checkpoints/checkpoint_last.pt")), process)
    (log,) = folder.glob("*/train.log")
    wait_for(lambda: "@ 6 updates" in log.read_text(), process)
    refused, _ = start(tmp_path, text).communicate(timeout=60)
    assert "another run" in refused
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait()
    else:
        assert "the same command goes on" in finish(process, expect=130)
    time.sleep(1)
    reached = log.stat().st_size
    output = finish(start(tmp_path, text, "--minutes", 0.3))
    resumed = log.read_text()[reached:]
    found = re.search(r"Loaded checkpoint .* @ (\d+) updates", resumed)
    assert found, resumed
    assert int(found[1]) >= 4
    assert int(re.search(r"([\d,]+) updates", output)[1].replace(",", "")) > int(found[1])


@pytest.mark.long
def test_a_mistake_gets_one_clear_sentence(tmp_path, text):
    assert "nowhere" in finish(start(tmp_path, tmp_path / "nowhere"), expect=2)
    assert "--minutes" in finish(start(tmp_path, text, "--minutes", -1), expect=2)
    text.write_bytes(b"caf\xe9")
    assert "not UTF-8" in finish(start(tmp_path, text), expect=2)
