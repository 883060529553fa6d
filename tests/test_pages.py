"""Proves that README and docs say what is so: every command runs, every link leads somewhere, one recipe."""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_flash.models.flash_lm import PRESETS
from support import pages, tools

README = tools.REPOSITORY / "README.md"
PARSERS = {
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": lambda: options.get_generation_parser(interactive=True),
}
#: What is run by other tests, or is no program of ours.
ELSEWHERE = ("source", "pip", "export", "bash", "head", "lm_eval")
ALL = [(page, command) for page in pages.PAGES for command in pages.commands(page)]


def each(condition=lambda words: True):
    found = [
        pytest.param(words, id=" ".join(words[:2])[:60]) for words in map(words_of, ALL) if condition(words)
    ]
    return pytest.mark.parametrize("words", found)


def words_of(pair):
    return pages.words(pair[1])


def test_the_front_page_is_short_and_has_two_pictures():
    text = pages.text_of(README)
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 2


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_every_link_leads_to_a_file(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", pages.text_of(page))
    for target in targets:
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_every_file_that_a_page_names_exists(page):
    named = re.findall(r"`((?:scripts|tests|fairseq_flash|docs)/[\w/.-]+\.\w+)`", pages.text_of(page))
    for name in named:
        assert (tools.REPOSITORY / name).exists(), name


def test_every_page_can_be_reached_from_the_front():
    reached, new = set(), {README}
    while new:
        page = new.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#]+\.md)\)", pages.text_of(page))
        new |= {(page.parent / target).resolve() for target in targets if "://" not in target} - reached
    assert set(pages.PAGES) <= reached


def has_options(words):
    trains = words[0] in PARSERS or words[0].endswith("train_distributed.sh")
    return trains and any(word.startswith("--") for word in words)


@each(has_options)
def test_every_option_of_a_tool_is_known_to_it(words):
    program, *rest = words
    rest = [str(tools.USER_DIR) if word == "fairseq_flash" else word for word in rest]
    parser = PARSERS.get(program, options.get_training_parser)()
    options.parse_args_and_arch(parser, rest)  # exits on an unknown option


@pytest.fixture(scope="module")
def helped():
    """What a script says to --help."""
    known = {}

    def ask(script):
        if script not in known:
            text = io.StringIO()
            argv = mock.patch.object(sys, "argv", [script, "--help"])
            with argv, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                runpy.run_path(str(tools.REPOSITORY / script), run_name="__main__")
            known[script] = text.getvalue()
        return known[script]

    return ask


@each(lambda words: words[1:] and words[1].startswith("scripts/") and words[0] == "python")
def test_every_option_of_a_script_is_in_its_help(words, helped):
    shown = helped(words[1])
    for option in (word for word in words[2:] if word.startswith("--")):
        assert re.search(rf"{option}\b", shown), option


def test_no_other_program_is_asked_for():
    known = {*PARSERS, "python", "scripts/train_distributed.sh", "fairseq-hydra-train", *ELSEWHERE}
    assert {words_of(pair)[0] for pair in ALL} - known == set()


def test_the_front_page_and_the_hydra_files_have_one_recipe():
    trainings = [words for words in map(pages.words, pages.commands(README)) if words[0] == "fairseq-train"]
    assert len(trainings) == 2
    for words in trainings:
        rest = [str(tools.USER_DIR) if word == "fairseq_flash" else word for word in words[1:]]
        found = options.parse_args_and_arch(options.get_training_parser(), rest)
        config = hydra(found.arch)
        assert found.share_decoder_input_output_embed
        assert found.lr == list(config.optimization.lr)
        assert found.max_update == config.optimization.max_update
        assert found.clip_norm == config.optimization.clip_norm
        assert found.lr_scheduler == config.lr_scheduler["_name"]
        assert found.warmup_updates == config.lr_scheduler.warmup_updates
        assert found.weight_decay == config.optimizer.weight_decay
        assert str(found.adam_betas) == config.optimizer.adam_betas
        assert found.tokens_per_sample == config.task.tokens_per_sample
        ours, theirs = found.update_freq[0], config.optimization.update_freq[0]
        assert found.max_tokens * ours == config.dataset.max_tokens * theirs


def test_the_table_of_sizes_is_what_is_built_and_trained():
    rows = re.findall(
        r"^\| `(flash_lm\w*)` \| (\d+) \| (\d+) \| (\d+) \|.*\| (\S+) \|$", pages.text_of(README), re.M
    )
    assert [row[0] for row in rows] == ["flash_lm_tiny", "flash_lm", "flash_lm_gpt", "flash_lm_big"]
    for arch, *numbers, rate in rows:
        model = hydra(arch).model
        assert list(map(int, numbers)) == [model.embed_dim, model.layers, model.chunk_size]
        assert float(rate) == hydra(arch).optimization.lr[0]
    assert {row[0] for row in rows} <= set(PRESETS)


def hydra(arch):
    _, *listed = OmegaConf.load(tools.CONFIGS / f"{arch}.yaml").defaults
    return OmegaConf.merge(*(OmegaConf.load(tools.CONFIGS / f"{part}.yaml") for part in listed))


def test_the_model_that_is_published_is_the_one_of_the_page():
    (training,) = [
        words
        for words in map(pages.words, pages.commands(tools.REPOSITORY / "docs" / "huggingface.md"))
        if words[0] == "fairseq-train"
    ]
    rest = [str(tools.USER_DIR) if word == "fairseq_flash" else word for word in training[1:]]
    args = options.parse_args_and_arch(options.get_training_parser(), rest)
    cfg, dictionary = convert_namespace_to_omegaconf(args), Dictionary()
    for index in range(8000 - len(dictionary)):
        dictionary.add_symbol(f"word{index}")
    with torch.device("meta"):
        model = tasks.TASK_REGISTRY[cfg.task._name](cfg.task, dictionary, dictionary).build_model(cfg.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    page, folder = (tools.REPOSITORY / "docs" / name for name in ("huggingface.md", "pretrained/gutenberg"))
    card = pages.text_of(folder / "README.md")
    assert f"# A FLASH model of {parameters / 1e6:.3g} M parameters" in card
    assert 2 * parameters < (folder / "model.safetensors").stat().st_size < 2 * parameters + 20_000
    tokens = args.max_update * args.max_tokens / 1e6
    for text in (card, pages.text_of(page)):
        said = re.search(r"(\d+)(?:,\d+,\d+ tokens in all| M tokens, 3.6 times)", text)
        assert int(said[1]) == pytest.approx(tokens, rel=0.01)


def test_the_page_of_options_is_what_the_script_writes():
    script = tools.load_script("write_options")
    assert pages.text_of(script.PAGE) == script.page()


def test_the_picture_of_the_layer_shows_what_the_oracle_lets_a_token_see(tmp_path):
    from report.diagram import seen

    branches = seen(7, 3)
    for i in range(7):
        for j in range(7):
            chunk = 1 if i // 3 == j // 3 and j <= i else 2 if j // 3 < i // 3 else 0
            assert branches[i, j] == chunk
    tools.load_script("draw_layer").main(["--output", str(tmp_path / "layer.png")])
    assert 10_000 < (tmp_path / "layer.png").stat().st_size < 250_000


def test_the_layers_page_runs():
    (code,) = pages.python(tools.REPOSITORY / "docs" / "layers.md")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(code, {})
    assert "ChunkState(kv_sum=(2, 128, 1024) float32" in text.getvalue()


#: What makes a command small enough for a test, by its program and, of a training, its task; the last counts.
UNITS = "--embed-dim 32 --attention-dim 16 --chunk-size 8"
SMALL = f"{UNITS} --layers 2"
UPDATES = "--max-update 3 --update-freq 1 --cpu --num-workers 0"
ROWS = "--tokens-per-sample 32 --max-tokens 256"
CUTS = {
    "language_modeling": f"{SMALL} {UPDATES} {ROWS}",
    "masked_lm": f"{SMALL} {UPDATES} {ROWS}",
    "sentence_prediction": f"{SMALL} {UPDATES}",
    "translation": f"{UNITS} --encoder-layers 1 --decoder-layers 1 {UPDATES} --max-tokens 500",
    "fairseq-eval-lm": f"--cpu {ROWS}",
    "fairseq-interactive": "--cpu --max-len-b 40",
    "fairseq-generate": "--cpu --max-len-b 10",
    "fairseq-hydra-train": "optimization.max_update=2 task.tokens_per_sample=32 dataset.max_tokens=256 "
    "model.embed_dim=32 model.layers=2 model.attention_dim=16 model.chunk_size=8 common.cpu=true",
    "scripts/prepare_lm.py": "--vocab-size 400",
    "scripts/prepare_corpus.py": "--vocab-size 400 --held-out-groups 2 --workers 1",
    "scripts/cut_corpus.py": "--train-tokens 9000 --held-out-tokens 900",
    "scripts/prepare_translation.py": "--vocab-size 400",
    "scripts/prepare_classification.py": "",
    "scripts/generate.py": "--cpu",
    "scripts/describe.py": f"{SMALL} --tokens-per-sample 64 --batch 1",
    "scripts/export_hf.py": "",
    "scripts/import_hf.py": "",
    "scripts/health.py": SMALL,
    "scripts/plot.py": "",
    "scripts/compare_lm.py": "--budget 2updates --tokens-per-sample 32 --tokens-per-update 64 --device cpu "
    "--seeds 1 --lr-grid 1e-3 --output mine/comparison.csv --folder out",
}
#: Pages of commands that train; the others' have tests of their own, beside the script.
STORIES = {
    "README.md": None,
    "docs/generation.md": r"benchmark|plot",
    "docs/recipes.md": r"^srun",
    "docs/compare.md": r"prepare_lm",
    "docs/huggingface.md": None,
    "docs/masked-models.md": r"authors|compare",
    "docs/translation.md": r"compare",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with this repository's commands and text, in which the README has been followed."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("scripts", "fairseq_flash", "docs"):
        (folder / name).symlink_to(tools.REPOSITORY / name)
    lines = tools.real_lines()
    tools.write_texts(folder / "books", **{"one.txt": lines[:300], "two.txt": lines[300:600]})
    for split, start in (("train", 0), ("valid", 200), ("test", 240)):
        part = lines[start : start + (200 if split == "train" else 20)]
        tools.write_texts(folder / "reviews" / split, **{"good.txt": part[::2], "bad.txt": part[1::2]})
        name = "val" if split == "valid" else split
        tools.write_texts(
            folder / "corpus", **{f"{name}.en": part, f"{name}.de": [one.upper() for one in part]}
        )
    for author in range(9):
        part = lines[600 + 100 * author : 700 + 100 * author]
        tools.write_texts(folder / "Gutenberg_Text" / f"author {author}", **{"book.txt": part})
    tools.write_texts(folder, **{"book.txt": lines[:20], "long-prompt.txt": lines[:1]})
    follow(folder, "README.md")
    return folder


def follow(folder, page):
    """Runs the commands of a page, each made small, and then its Python."""
    skipped = STORIES[page]
    for command in pages.commands(tools.REPOSITORY / page):
        program, *rest = pages.words(command)
        if program in ELSEWHERE or (skipped and re.search(skipped, command)):
            continue
        task = rest[rest.index("--task") + 1] if "--task" in rest else ""
        training = program == "fairseq-train" or program.endswith("train_distributed.sh")
        cut = CUTS[task if training else rest[0] if program == "python" else program]
        run(folder, f"{command.replace(' --compile', '')} {cut}")
    for code in pages.python(tools.REPOSITORY / page):
        (folder / "page.py").write_text(code)
        run(folder, "python page.py")


def run(folder, command):
    program = f"{sys.prefix}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": program, "PYTHONPATH": str(tools.REPOSITORY), "VIRTUAL_ENV": sys.prefix},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"


@pytest.mark.long
def test_the_front_page_can_be_followed(world):
    assert (world / "checkpoints" / "checkpoint_best.pt").exists()
    assert (world / "comparison.html").exists()
    assert (world / "mine" / "comparison_curves.csv").exists()


@pytest.mark.long
@pytest.mark.parametrize("page", list(STORIES)[1:])
def test_a_page_can_be_followed_after_the_front_page(world, page, tmp_path):
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    if "masked" in page or "translation" in page:  # of another model than the front page's
        shutil.rmtree(tmp_path / "world" / "checkpoints")
    follow(tmp_path / "world", page)


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    notebook = json.loads((tools.REPOSITORY / "docs" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs are not committed"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tools.REPOSITORY))
    assert "UPDATES = 200" in cells[0]
    names = {}
    for cell in [cells[0].replace("UPDATES = 200", "UPDATES = 4"), *cells[1:]]:
        exec(cell, names)
    shown = capsys.readouterr().out
    assert len(names["losses"]) >= 1
    assert "Loss (base 2): " in shown
    assert "DecodingState(layers=8 x ChunkState(kv_sum=(1, 128, 512) float32" in shown
    assert "GatedAttentionUnit(\n  256, attention='mixed_chunk', chunk_size=128, causal=True" in shown


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_the_pictures_of_pages_are_committed():
    for page in pages.PAGES:
        for picture in re.findall(r"^!\[[^]]+\]\(([^)]+)\)", pages.text_of(page), re.MULTILINE):
            assert (page.parent / picture).stat().st_size < 250_000
