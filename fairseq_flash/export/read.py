"""A folder of transformers as a checkpoint of fairseq."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file

from fairseq_flash.export.names import CLASSES, FILES, MODEL_TYPE, PREFIXES, TASKS, TIED, options_of
from fairseq_flash.models.flash_lm import FlashLanguageModel

__all__ = ["import_folder", "load_folder", "save_checkpoint"]


def load_folder(folder: Path) -> tuple[FlashLanguageModel, Any, Path]:
    """Loads a language model from what :func:`export_checkpoint` wrote. Runs no code from the folder.

    Args:
        folder: As that of :func:`import_folder`.

    Returns:
        The model in evaluation mode, in float32; its task; and the folder, which holds its dictionary.

    Raises:
        ValueError: something is missing or cannot be read, or the model is of masked words.
    """
    settings, kind = _settings(folder)
    if kind is not FlashLanguageModel:
        found, allowed = settings["architectures"][0], CLASSES[FlashLanguageModel]
        raise ValueError(f"{folder} holds a {found}; allowed: {allowed}")
    _, task, model = _build(folder, settings, kind)
    return model.eval(), task, folder


def import_folder(folder: Path, checkpoint: Path) -> None:
    """Writes a checkpoint from what :func:`export_checkpoint` wrote, or what transformers saved since.

    Beside it lie the dictionary and the model of the pieces. Runs no code from the folder.

    Args:
        folder: With ``config.json``, ``*.safetensors`` and ``dict.txt``.
        checkpoint: The file to write; it must not be there yet.

    Raises:
        ValueError: something is missing, of another kind, or there already.
    """
    settings, kind = _settings(folder)
    if checkpoint.exists():
        raise ValueError(f"{checkpoint} exists already; allowed: a file that does not")
    copied = [(folder / name, checkpoint.parent / name) for name in FILES if (folder / name).exists()]
    for source, target in copied:
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise ValueError(f"{target} is another one than {source}; allowed: a folder of its own")
    cfg, _, model = _build(folder, settings, kind)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for source, target in copied:
        if not target.exists():
            shutil.copyfile(source, target)
    cfg.task.data = "."
    save_checkpoint(checkpoint, cfg, model)


def save_checkpoint(path: Path, cfg: DictConfig, model: torch.nn.Module) -> None:
    """Writes a model as fairseq-train does, without an optimizer; a kill leaves no half of it.

    To train it on, ``--finetune-from-model`` names it.

    Args:
        path: The file.
        cfg: The whole configuration.
        model: Built from it.
    """
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [
            dict(criterion_name="", optimizer_name="", lr_scheduler_state={}, num_updates=0)
        ],
        "extra_state": {},
        "last_optimizer_state": None,
    }
    new = path.with_name(path.name + ".new")
    torch.save(state, new)
    os.replace(new, path)


def _build(folder: Path, settings: dict[str, Any], kind: type) -> tuple[DictConfig, Any, Any]:
    """The configuration, the task and the model, with the folder's weights."""
    cfg = _configuration(folder, settings, kind)
    try:
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
        model.load_state_dict(_weights(folder, kind, model))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from None
    return cfg, task, model


def _settings(folder: Path) -> tuple[dict[str, Any], type]:
    """The content of ``config.json``, and the class of the model."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(settings, dict) or settings.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder / 'config.json'} is of another model; allowed: model_type {MODEL_TYPE!r}")
    kinds = [kind for kind, name in CLASSES.items() if settings.get("architectures") == [name]]
    if not kinds:
        allowed = [[name] for name in CLASSES.values()]
        raise ValueError(f"config.json: architectures is {settings.get('architectures')}; allowed: {allowed}")
    if not (folder / "dict.txt").exists():
        raise ValueError(f"{folder} holds no dict.txt, the tokenizer's file")
    return settings, kinds[0]


def _configuration(folder: Path, settings: dict[str, Any], kind: type) -> DictConfig:
    """The configuration of fairseq-train for such a model."""
    task, arch = TASKS[kind]
    words = [str(folder), "--task", task, "--arch", arch]
    cfg = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(default_task=task), words)
    )
    causal = kind is FlashLanguageModel
    given = options_of(settings, "share_decoder_input_output_embed" if causal else "untie_weights_roberta")
    if settings.get("n_ref") is not None:
        given["n_ref"] = settings["n_ref"]
    given["dropout"] = settings.get("dropout", 0.0)
    try:
        with open_dict(cfg):
            cfg.model.update(given)
            if causal:
                cfg.task.add_bos_token = settings.get("bos_token_id") != settings.get("eos_token_id")
    except OmegaConfBaseException as error:
        raise ValueError(f"config.json: {error}") from None
    return cfg


def _weights(folder: Path, kind: type, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model, with the numbers of the folder."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    if not stored:
        raise ValueError("it holds no *.safetensors")
    if TIED[1] in stored:
        stored.setdefault(TIED[0], stored[TIED[1]])
    there = {prefix: here for here, prefix in PREFIXES[kind].items()}
    # What is no parameter, such as the length that scores are divided by, follows from the options.
    found = {name: x for name, x in model.state_dict().items() if name not in dict(model.named_parameters())}
    for name, weight in stored.items():
        prefix = next((prefix for prefix in there if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"weight {name!r} is unknown; allowed: names that begin with {', '.join(there)}")
        found[there[prefix] + name.removeprefix(prefix)] = weight
    return found
