"""Proves that imports go one way, that calls can be read, and that few layers know fairseq."""

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
    "export": {"generation", "models"},
}
FILES = sorted(path for layer in BELOW for path in (PACKAGE / layer).rglob("*.py"))
SCRIPTS = PACKAGE.parent / "scripts"
COMMANDS = {path.stem for path in SCRIPTS.glob("*.py")}
SCRIPT_FILES = sorted(SCRIPTS.rglob("*.py"))
#: But for Triton's: a kernel's parameters are pointers and sizes, and PyTorch's operators around one take
#: tensors one by one, so that neither can be given an object.
OWN = [path for path in (*sorted(PACKAGE.rglob("*.py")), *SCRIPT_FILES) if "kernel" not in path.name]
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
            assert layer in ("models", "tasks", "generation", "export"), f"{layer} imports {name}"
        # A kernel file is imported when it is first asked for: see ops/dispatch.py.
        assert top != "triton" or (layer == "ops" and "kernel" in path.name), f"{path.name} imports triton"
        assert not name.endswith(".kernel"), f"{path.name} imports a kernel whenever it is imported itself"


def signatures(path):
    """Name, parameters but the first of a method, and those among them without a type, of each function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            variable = [one for one in (given.vararg, given.kwarg) if one is not None]
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *variable]
            parameters = [one for one in parameters if one.arg not in ("self", "cls")]
            yield node.name, len(parameters), [one.arg for one in parameters if one.annotation is None]


@pytest.mark.parametrize("path", OWN, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_a_call_can_be_read(path):
    """Nine parameters at most, six of a public function of ops, each with a type, in a short file."""
    for name, number, bare in signatures(path):
        public_op = "ops" in path.parts and not name.startswith("_")
        assert number <= (6 if public_op else 9), f"{path.name}: {name} takes {number}"
        assert not bare, f"{path.name}: {name} takes {', '.join(bare)} of no type"
    # What an export carries is one file on purpose: it is read where nothing else of this repository is.
    if path.name != "modeling_flash.py":
        assert len(path.read_text().splitlines()) < 300


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
