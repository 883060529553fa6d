"""Proves that imports go one way, and that fairseq stays in the layers that know it."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "fairseq_flash"
#: What each layer may import beside itself.
BELOW = {
    "ops": set(),
    "modules": {"ops"},
    "models": {"modules"},
    "tasks": {"models", "modules"},
    "generation": {"models", "modules", "_compat"},
}
FILES = sorted(path for layer in BELOW for path in (PACKAGE / layer).rglob("*.py"))
SCRIPTS = PACKAGE.parent / "scripts"
COMMANDS = {path.stem for path in SCRIPTS.glob("*.py")}
SCRIPT_FILES = sorted(SCRIPTS.rglob("*.py"))
ROOMS = {"text", "runs", "bench", "report"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_lies_below(path):
    layer = path.relative_to(PACKAGE).parts[0]
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "fairseq_flash":
            assert (rest or [""])[0] in BELOW[layer] | {layer}, f"{layer} imports {name}"
        if top in ("fairseq", "fairseq_cli", "omegaconf", "hydra"):
            assert layer in ("models", "tasks", "generation"), f"{layer} imports {name}"
        # A kernel file is imported when it is first asked for: see ops/dispatch.py.
        assert top != "triton" or (layer == "ops" and "kernel" in path.name), f"{path.name} imports triton"
        assert not name.endswith(".kernel"), f"{path.name} imports a kernel whenever it is imported itself"


@pytest.mark.parametrize("path", SCRIPT_FILES, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_no_script_imports_a_command(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & COMMANDS
    if path.parent == SCRIPTS:
        assert 'if __name__ == "__main__":' in path.read_text(), f"{path.name} is no command"
    elif path.parent.name in ROOMS:
        assert path.parent.parent == SCRIPTS


def test_rooms_are_those_of_the_layout():
    assert {path.parent.name for path in SCRIPTS.glob("*/__init__.py")} == ROOMS | {"ablation"}


def test_modules_work_where_fairseq_is_not_installed():
    code = (
        "import sys; sys.modules['fairseq'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'fairseq' else find(name, *a)\n"
        "import torch; from fairseq_flash.modules import GatedAttentionUnit\n"
        "print(GatedAttentionUnit(8)(torch.zeros(1, 3, 8))[0].shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "torch.Size([1, 3, 8])", run.stderr
