"""Proves what a stranger meets first: layers by the package's name, that say what they are."""

import subprocess
import sys

import pytest
import torch
from fairseq import options

import fairseq_flash
from fairseq_flash import modules
from fairseq_flash._compat.messages import _OPTIONS
from support import tools


def test_layers_are_there_under_the_packages_name():
    for name in modules.__all__:
        assert getattr(fairseq_flash, name) is getattr(modules, name)
    with pytest.raises(AttributeError, match="'fairseq_flash' has no attribute 'Nothing'"):
        fairseq_flash.Nothing  # noqa: B018


def test_they_need_no_fairseq():
    code = (
        "import sys, importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'fairseq' else found(name, *rest)\n"
        "import fairseq_flash; before = 'torch' in sys.modules; fairseq_flash.GatedAttentionUnit(8)\n"
        "print(before, 'fairseq' in sys.modules)"
    )
    done = tools.run("python", "-c", code)
    assert done.stdout.split()[-2:] == ["False", "False"], done.stdout


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (
            modules.GatedAttentionUnit(8, attention_dim=4, chunk_size=3, causal=True),
            "(8, attention='mixed_chunk', chunk_size=3, causal=True)",
        ),
        (
            modules.GatedAttentionUnit(8, attention_dim=4, attention="quadratic", causal=False, n_ref=5),
            "(8, attention='quadratic', causal=False)",
        ),
        (
            modules.TransformerBlock(8, attention="local", attention_dim=4, chunk_size=3),
            "(8, attention='local', chunk_size=3, causal=True)",
        ),
    ],
)
def test_a_layer_shows_attention_chunk_and_causality(layer, shown):
    first, second = repr(layer).splitlines()[:2]
    assert f"{first}{second.strip()}" == f"{type(layer).__name__}({shown[1:-1]}"


@pytest.mark.parametrize("attention", ["mixed_chunk", "quadratic"])
def test_a_state_prints_shapes_and_no_numbers(attention):
    sizes = {"attention_dim": 4, "chunk_size": 3, "n_ref": 9}
    unit = modules.GatedAttentionUnit(8, attention=attention, causal=True, **sizes)
    _, state = unit(torch.full((2, 5, 8), 0.123), None, unit.empty_state(torch.zeros(2)))
    shown = repr(modules.DecodingState((state, state)))
    assert shown.startswith(f"DecodingState(layers=2 x {type(state).__name__}(")
    assert "position=(2,) int64" in shown
    assert "v=(2, " in shown
    assert "tensor" not in shown
    assert "0.1" not in shown


def test_what_the_oldest_name_of_an_option_is_here(capsys):
    """Every size and rate of transformer_lm that ours calls by another name."""
    theirs, ours = (
        {word for action in parser._actions for word in action.option_strings}
        for parser in (parser_of("transformer_lm"), parser_of("flash_lm"))
    )
    sizes = {name for name in theirs - ours if name.endswith(("-dim", "-layers", "-heads", "dropout"))}
    assert {"--decoder-layers", "--decoder-embed-dim", "--decoder-attention-heads"} <= sizes
    # mixtures of experts, words from characters, a factor for each head: there is nothing like them
    unlike = {"--base-layers", "--char-embedder-highway-layers", "--character-embedding-dim", "--scale-heads"}
    assert sizes - set(_OPTIONS) <= unlike
    for name in sizes - unlike:
        words = ["data", "--task", "language_modeling", "--arch", "flash_lm", name, "4"]
        with pytest.raises(SystemExit):
            options.parse_args_and_arch(options.get_training_parser(), words)
        assert f"{name} is {_OPTIONS[name]}" in capsys.readouterr().err


def parser_of(arch):
    """fairseq-train's, with the options of an architecture."""
    from fairseq.models import ARCH_MODEL_REGISTRY

    parser = options.get_training_parser()
    ARCH_MODEL_REGISTRY[arch].add_args(parser)
    return parser


def test_the_version_is_that_of_the_changelog():
    text = (tools.REPOSITORY / "CHANGELOG.md").read_text()
    assert text.split("\n## ")[1].splitlines()[0] == fairseq_flash.__version__
    shown = subprocess.run(
        [sys.executable, "-c", "import fairseq_flash; print(fairseq_flash.__version__)"],
        capture_output=True,
        text=True,
        cwd=tools.REPOSITORY,
    )
    assert shown.stdout.strip() == fairseq_flash.__version__
