"""Proves that every command works from any folder, from an installed package and from a clone."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import fairseq_flash
from fairseq_flash import console
from support import tools

LINES = 300


@pytest.fixture
def started(monkeypatch):
    """What a tool of fairseq was started with."""
    found = []

    class Tool:
        @staticmethod
        def cli_main():
            found.append(list(sys.argv))

    monkeypatch.setattr(console.importlib, "import_module", lambda name: found.append(name) or Tool)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return found


def test_the_list_names_every_command_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as ended:
        console.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for command in console.COMMANDS:
        assert re.search(rf"^  {command} +\w.{{20,}}", shown, re.MULTILINE)
    for tool, module in console.TOOLS.items():
        assert re.search(rf"^  {tool} +fairseq-{module.replace('_', '-')} ", shown, re.MULTILINE)


def test_a_version_and_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as ended:
        console.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == fairseq_flash.__version__
    for words in ([], ["teach"]):
        with pytest.raises(SystemExit) as ended:
            console.main(words)
        assert ended.value.code == 2
    assert "prepare-lm" in capsys.readouterr().err


def test_every_script_that_is_for_users_is_a_command():
    own = {
        "ablate",
        "benchmark_kernels",
        "benchmark_loss",
        "candidates",
        "draw_layer",
        "quickstart",
        "write_configs",
        "write_options",
    }  # for those who work on a clone
    files = {path.stem for path in (tools.REPOSITORY / "scripts").glob("*.py")}
    assert {command.replace("-", "_") for command in console.COMMANDS} == files - own


def test_a_tool_of_fairseq_gets_the_plug_in(started):
    assert console.main(["train", "data", "--arch", "flash_lm"]) == 0
    assert started[0] == "fairseq_cli.train"
    assert started[1] == ["fairseq-train", "--user-dir", str(console.PACKAGE), "data", "--arch", "flash_lm"]
    console.main(["generate-text", "data"])
    assert started[2:4] == [
        "fairseq_cli.generate",
        ["fairseq-generate", "--user-dir", str(console.PACKAGE), "data"],
    ]
    console.main(["hydra-train", "--config-name", "flash_lm"])
    assert started[5][1] == f"common.user_dir={console.PACKAGE}"


def test_a_plug_in_of_ones_own_stays(started):
    for words in (["--user-dir", "mine"], ["--user-dir=mine"]):
        console.main(["train", "data", *words])
        assert started[-1] == ["fairseq-train", "data", *words]
    console.main(["hydra-train", "common.user_dir=mine"])
    assert started[-1] == ["fairseq-hydra-train", "common.user_dir=mine"]


@pytest.fixture
def missing(monkeypatch):
    """Takes a package away."""

    def take(name):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", list(sys.argv))

    return take


def test_a_missing_package_is_named_with_what_to_install(missing, capsys):
    missing("tqdm")
    assert console.main(["prepare-classification", "--help"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Turns text files with labels")
    expected = "fairseq-flash prepare-classification: tqdm is not installed; allowed: pip install tqdm\n"
    assert captured.err == expected


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_script_names_a_missing_package_as_well(kind, missing, monkeypatch, capsys):
    missing("safetensors")
    for module in [name for name in sys.modules if name.startswith("fairseq_flash.export")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "argv", [f"{kind}_hf.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(console.SCRIPTS / f"{kind}_hf.py"), run_name="__main__")
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "transformers" in captured.out, "the help is there all the same"
    remedy = "allowed: pip install 'fairseq-flash[hf]'"
    assert captured.err == f"{kind}_hf.py: safetensors is not installed; {remedy}\n"


def test_an_error_of_ours_is_not_taken_for_a_missing_package(monkeypatch):
    def broken(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'json.nothing'", name="json.nothing")

    monkeypatch.setattr(console.runpy, "run_path", broken)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(ModuleNotFoundError):
        console.main(["describe"])


def test_results_go_into_the_users_folder_where_there_is_no_clone(monkeypatch, tmp_path):
    assert console._with_places("extrapolate", ["--data", "x"]) == ["--data", "x"]
    monkeypatch.setattr(console, "INSTALLED", console.SCRIPTS)
    monkeypatch.chdir(tmp_path)
    words = console._with_places("extrapolate", ["--data", "x", "--output", "mine.csv"])
    places = ["--output", f"{tmp_path}/results/extrapolation.csv"]
    assert words == [*places, "--data", "x", "--output", "mine.csv"]
    assert console._with_places("describe", ["--arch", "flash_lm"]) == ["--arch", "flash_lm"]


def test_every_command_that_writes_into_a_clone_has_another_place():
    for command in console.COMMANDS:
        text = console._script(command).read_text()
        if "ROOT" in text.replace("import ROOT", "") and re.search(r"RESULTS|results", text):
            reads_only = command == "describe"
            assert (command in console.PLACES) != reads_only, command


def copied(folder: Path) -> Path:
    """The files of this repository, without what has been built beside them."""
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "*.egg-info", "figures", "quickstart", "outputs"
    )
    for name in ("fairseq_flash", "scripts", "docs"):
        shutil.copytree(tools.REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tools.REPOSITORY / name, folder / name)
    return folder


def bare_environment(folder: Path) -> Path:
    """An environment that finds the packages of this one, but not this repository."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # What lies in a folder named here is found; how that folder installs others, such as us, is not.
    (site / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def succeed(command, **options) -> str:
    """Runs a command without this repository on its path: what it printed."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    done = subprocess.run(
        list(map(str, command)),
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def install(python: Path, *what) -> None:
    quiet = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    succeed([sys.executable, "-m", "pip", "--python", python, "install", *quiet, *what])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """This repository as a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    quiet = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    source = copied(folder / "source")
    succeed([sys.executable, "-m", "pip", "wheel", *quiet, "--wheel-dir", folder, source])
    return next(folder.glob("*.whl"))


def contents(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.long
def test_a_wheel_holds_every_file_that_a_command_needs(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(tools.REPOSITORY)): path
        for pattern in (
            "fairseq_flash/**/*.py",
            "fairseq_flash/**/*.yaml",
            "scripts/**/*.py",
            "scripts/text/*.csv",
        )
        for path in tools.REPOSITORY.glob(pattern)
    }
    lacking = {name for name in wanted if re.sub("^scripts/", "fairseq_flash_commands/", name) not in held}
    assert not lacking
    assert f"fairseq_flash-{fairseq_flash.__version__}-" in wheel.name
    # docs/ holds a trained model.
    assert not [name for name in held if name.startswith(("tests", "scripts", "docs"))]
    assert not [name for name in held if name.endswith((".safetensors", ".model"))]


@pytest.mark.long
def test_the_description_of_a_wheel_links_to_nothing_that_an_index_lacks(wheel):
    with zipfile.ZipFile(wheel) as held:
        (name,) = [name for name in held.namelist() if name.endswith(".dist-info/METADATA")]
        described = held.read(name).decode()
    assert "## Is it better on my data?" in described
    assert re.findall(r"\]\((?!https://)", described) == []
    for field in ("Maintainer: ", "Keywords: ", "Project-URL: ", f"Version: {fairseq_flash.__version__}"):
        assert f"\n{field}" in described


@pytest.fixture
def installed(wheel, tmp_path):
    """How to run an installed command in an empty folder, where it is installed, and the folder."""
    python, here = bare_environment(tmp_path / "venv"), tmp_path / "here"
    install(python, wheel)
    here.mkdir()
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    assert str(site) in succeed([python, "-c", "import fairseq_flash as f; print(f.__file__)"], cwd=here)

    def flash(*words, program="fairseq-flash"):
        return succeed([python.with_name(program), *words], cwd=here)

    return flash, site, here


@pytest.mark.long
def test_every_command_of_an_installed_wheel_has_help(installed):
    flash = installed[0]
    assert "prepare-lm" in flash("--help")
    for command in console.COMMANDS:
        shown = flash(command, "--help")
        assert "usage: " in shown
        assert "Traceback" not in shown


@pytest.mark.long
def test_who_installs_a_wheel_prepares_trains_and_generates_in_an_empty_folder(installed):
    flash, site, here = installed
    (here / "text").write_text("\n".join(tools.real_lines()[:LINES]) + "\n")
    before = contents(site)
    flash("--text", "text", "--output", "data", "--vocab-size", "500", program="flash-prepare-lm")
    train = ("data", "--save-dir", "model", *tools.RECIPE, *tools.ADAM, *tools.TINY, *tools.CHUNKS)
    flash("train", *train, "--max-update", "5")
    assert (here / "model" / "checkpoint_last.pt").exists()
    assert "Perplexity" in flash("eval-lm", "data", "--path", "model/checkpoint_last.pt", "--cpu")
    words = ("model", "--data", "data", "--cpu", "--prompt", "the", "--tokens", "5")
    assert flash("generate", *words) == flash(*words, program="flash-generate")
    assert "usage: " in flash("--help", program="flash-describe")  # its work takes minutes
    quick = (
        "--systems",
        "flash_lm",
        "--tokens-per-sample",
        "32",
        "--budget",
        "2updates",
        "--lr-grid",
        "1e-3",
    )
    quick += ("--tokens-per-update", "64", "--device", "cpu", "--", *tools.SMALL)
    flash("--data", "data", *quick, program="flash-compare-lm")
    assert (here / "comparison" / "comparison.csv").exists()
    assert contents(site) == before, "something was written beside the package"


@pytest.mark.long
def test_an_editable_install_runs_the_scripts_of_the_clone(tmp_path):
    source = copied(tmp_path / "source")
    python = bare_environment(tmp_path / "venv")
    install(python, "-e", source)
    (tmp_path / "here").mkdir()
    code = "from fairseq_flash import console; print(console.SCRIPTS)"
    assert succeed([python, "-c", code], cwd=tmp_path / "here").strip().endswith(str(source / "scripts"))
    shown = succeed([python.with_name("fairseq-flash"), "prepare-lm", "--help"], cwd=tmp_path / "here")
    assert "usage: prepare_lm.py" in shown
