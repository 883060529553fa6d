"""Proves that each yaml in configs/ builds what its architecture name builds, and trains as it stands."""

import dataclasses

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, merge_with_parent
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fairseq_flash.models import flash_lm, flash_masked_lm, flash_seq2seq
from support import tools

#: By registered model: its options, its architectures, and the task that its yamls name.
MODELS = {
    "flash_lm": (flash_lm.FlashLanguageModelConfig, flash_lm.PRESETS, "language_modeling"),
    "flash_masked_lm": (flash_masked_lm.FlashMaskedLMConfig, flash_masked_lm.PRESETS, "masked_lm"),
    "flash_seq2seq": (flash_seq2seq.FlashSeq2SeqConfig, flash_seq2seq.PRESETS, "translation"),
}
ARCHITECTURES = {arch: model for model, (_, presets, _) in MODELS.items() for arch in presets}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a dictionary, and one for each of two languages."""
    folder = tmp_path_factory.mktemp("dictionary")
    for name in ("dict.txt", "dict.en.txt", "dict.de.txt"):
        Dictionary().save(str(folder / name))
    # By its name fairseq knows the languages.
    (folder / "train.en-de.en.idx").touch()
    return folder


def from_yaml(name: str, data):
    """The configuration that fairseq-hydra-train makes of a yaml."""
    GlobalHydra.instance().clear()
    hydra_init(name)
    with initialize_config_dir(str(tools.CONFIGS), version_base="1.1"):
        cfg = compose(name, overrides=[f"task.data={data}", f"common.user_dir={tools.USER_DIR}"])
    add_defaults(cfg)
    return cfg


def from_arch(name: str, data):
    """The configuration that fairseq-train makes of an architecture name."""
    task = MODELS[ARCHITECTURES[name]][2]
    words = [str(data), "--user-dir", str(tools.USER_DIR), "--task", task, "--arch", name]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    return convert_namespace_to_omegaconf(args)


def fields(name: str) -> set[str]:
    """The options of an architecture's model."""
    return {field.name for field in dataclasses.fields(MODELS[ARCHITECTURES[name]][0])} - {"_name"}


def values(name: str, cfg) -> dict:
    parent = MODELS[ARCHITECTURES[name]][0]()
    merged = OmegaConf.to_container(merge_with_parent(parent, cfg), enum_to_str=True)
    return {option: merged[option] for option in fields(name)}


def shapes(cfg) -> dict:
    """Parameters' and buffers' shapes, without memory for them."""
    task = tasks.setup_task(cfg.task)
    with torch.device("meta"):
        model = task.build_model(cfg.model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_every_architecture_has_a_yaml_and_no_yaml_is_left_over():
    assert {path.stem for path in tools.CONFIGS.glob("*.yaml")} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_yaml_builds_what_the_architecture_builds(name, data):
    yaml, arch = from_yaml(name, data), from_arch(name, data)
    assert values(name, yaml.model) == values(name, arch.model)
    if "tokens_per_sample" in arch.task:
        yaml.task.tokens_per_sample = arch.task.tokens_per_sample
    assert shapes(yaml) == shapes(arch)


def parts(name: str) -> list:
    """What a yaml is composed of: the recipe, and how the preset differs if it does."""
    first, *listed = OmegaConf.load(tools.CONFIGS / f"{name}.yaml").defaults
    assert first == "_self_"
    return [OmegaConf.load(tools.CONFIGS / f"{part}.yaml") for part in listed]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_yaml_writes_out_every_option_of_the_model(name):
    written = OmegaConf.merge(*parts(name))
    assert set(written.model) == fields(name) | {"_name"}
    assert written.model["_name"] == ARCHITECTURES[name], "hydra ignores architecture names"
    assert written.task["_name"] == MODELS[ARCHITECTURES[name]][2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_preset_says_only_what_differs_from_its_recipe(name):
    recipe, *changes = parts(name)
    for section, differing in OmegaConf.merge(*changes).items() if changes else ():
        for option, value in differing.items():
            assert recipe[section][option] != value, f"{section}.{option}"


def test_hydra_train_runs_the_yaml_with_data_and_user_dir_alone(data_bin, tmp_path):
    """Smaller in every size, which the command line overrides, for time's sake."""
    small = ("model.embed_dim=32", "model.layers=2", "model.attention_dim=16", "model.chunk_size=8")
    few = ("optimization.max_update=2", "task.tokens_per_sample=32", "dataset.max_tokens=256")
    done = tools.run(
        *("fairseq-hydra-train", "--config-dir", tools.CONFIGS, "--config-name", "flash_lm_tiny"),
        *(f"task.data={data_bin}", f"common.user_dir={tools.USER_DIR}", *small, *few),
        *("common.log_format=json", "common.log_interval=1", f"hydra.run.dir={tmp_path}"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    assert [update for update, _ in tools.losses(done.stdout)] == ["1", "2"]
    path = tmp_path / "checkpoints" / "checkpoint_last.pt"
    output = tools.call(
        *("eval-lm", data_bin, "--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--num-workers", "0"),
        *("--tokens-per-sample", "32", "--batch-size", "4"),
    )
    assert 50 < tools.perplexity(output) < 300


def test_the_script_writes_exactly_the_committed_files(tmp_path, monkeypatch):
    script = tools.load_script("write_configs")
    monkeypatch.setattr(script, "CONFIGS", tmp_path)
    script.main([])
    written, committed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.yaml")}
        for folder in (tmp_path, tools.CONFIGS)
    )
    assert written == committed
