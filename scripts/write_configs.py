"""Writes fairseq_flash/configs: a hydra file for each architecture, and the recipe of each task.

    python scripts/write_configs.py

fairseq's hydra ignores architecture names, so their options are written down; run it again after an option or
an architecture changed (the tests compare the files with what ``--arch`` builds).
"""

import argparse
import dataclasses
import enum
from pathlib import Path
from typing import Any, NamedTuple, Optional

from fairseq_flash.models import flash_lm, flash_masked_lm, flash_seq2seq
from fairseq_flash.models._presets import MASKED_LM_SYSTEMS, SYSTEMS

CONFIGS = Path(__file__).resolve().parent.parent / "fairseq_flash" / "configs"

TITLES = {
    "flash_lm": "FLASH",
    "flash2_lm": "FLASH with shifted keys and a fading mean",
    "flash_quad_lm": "FLASH-Quad",
    "flash_local_lm": "FLASH LocalOnly",
    "flash_global_lm": "FLASH GlobalOnly",
    "transformer_plus_lm": "Transformer+ (rotary positions)",
    "transformer_pp_lm": "Transformer++ (rotary positions, gated feed-forward network)",
    "mc_transformer_pp_lm": "MC-TFM++ (Transformer++ with mixed chunk attention)",
    "flash_masked_lm": "Bidirectional FLASH for masked words",
    "flash_quad_masked_lm": "Bidirectional FLASH-Quad for masked words",
    "flash_seq2seq": "FLASH as an encoder-decoder",
}

#: By ending: tokens a row, tokens a batch, batches an update, warm-up updates, updates, learning rate.
TRAINING = {
    "": (1024, 8192, 1, 4000, 100000, 5e-4),
    "_tiny": (512, 4096, 1, 500, 10000, 4e-3),
    "_gpt": (1024, 8192, 4, 4000, 100000, 5e-4),
    "_big": (1024, 4096, 8, 4000, 100000, 3e-4),
    "_paper": (1024, 8192, 1, 4000, 100000, 5e-4),
}
MASKED_LM_TRAINING = {
    "": (512, 8192, 16, 10000, 125000, 5e-4),
    "_tiny": (512, 4096, 1, 500, 10000, 2e-3),
}
#: The same without tokens a row: a row is a sentence.
SEQ2SEQ_TRAINING = {
    "": (None, 4096, 1, 4000, 50000, 5e-4),
    "_tiny": (None, 2048, 1, 500, 10000, 2e-3),
    "_wmt": (None, 4096, 8, 4000, 100000, 7e-4),
}


class Kind(NamedTuple):
    """What the architectures of one registered model have in common."""

    model: str
    config: type
    presets: dict[str, dict]
    systems: dict[str, dict]
    training: dict[str, tuple]
    task: str
    criterion: str


KINDS = (
    Kind(
        *("flash_lm", flash_lm.FlashLanguageModelConfig, flash_lm.PRESETS, SYSTEMS, TRAINING),
        *("language_modeling", "cross_entropy"),
    ),
    Kind(
        *("flash_masked_lm", flash_masked_lm.FlashMaskedLMConfig, flash_masked_lm.PRESETS),
        *(MASKED_LM_SYSTEMS, MASKED_LM_TRAINING, "masked_lm", "masked_lm"),
    ),
    Kind(
        *("flash_seq2seq", flash_seq2seq.FlashSeq2SeqConfig, flash_seq2seq.PRESETS, {"flash_seq2seq": {}}),
        *(SEQ2SEQ_TRAINING, "translation", "label_smoothed_cross_entropy\n  label_smoothing: 0.1"),
    ),
)

RECIPE = """\
# @package _global_
# {command}
common:
  log_format: simple
  log_interval: 100
  seed: 1
checkpoint:
  no_epoch_checkpoints: true
  save_interval_updates: 2000
  keep_interval_updates: 1
task:
  _name: {task}
  data: ???
{rows}
dataset:
  max_tokens: {max_tokens}
  num_workers: 2
criterion:
  _name: {criterion}
optimizer:
  _name: adam
  adam_betas: (0.9, 0.98)
  weight_decay: 0.01
lr_scheduler:
  _name: inverse_sqrt
  warmup_updates: {warmup_updates}
  warmup_init_lr: 1.0e-07
optimization:
  max_update: {max_update}
  lr: {lr}
  clip_norm: 1.0
  update_freq: {update_freq}
# Every option of the model; hydra ignores the names of architectures, so the presets say how they differ.
model:
  _name: {model}
{options}
"""

PRESET = """\
# {title}.
#   fairseq-hydra-train --config-dir fairseq_flash/configs --config-name {name} \\
#     task.data=/path/to/data-bin common.user_dir=/path/to/fairseq_flash
# Both paths absolute: hydra runs in a folder of its own, outputs/<date>/<time>.
defaults:
  - _self_
  - recipe/{task}
"""


def recipe(kind: Kind) -> str:
    """The yaml that all presets of a model begin with: the task, its training, and the model's defaults."""
    rows = (
        "  source_lang: null\n  target_lang: null"
        if kind.task == "translation"
        else "  sample_break_mode: none"
    )
    training = _training(kind.training[""])
    if "tokens_per_sample" in training["task"]:
        rows += f"\n  tokens_per_sample: {training['task']['tokens_per_sample']}"
    numbers = {name: value for section in training.values() for name, value in section.items()}
    return RECIPE.format(
        command=f"What every preset of {kind.model} begins with; written by scripts/write_configs.py.",
        task=kind.task,
        rows=rows,
        criterion=kind.criterion,
        model=kind.model,
        options=_lines({field.name: field.default for field in _fields(kind)}),
        **numbers,
    )


def presets(name: str, kind: Kind) -> dict[str, str]:
    """The yaml of one architecture, and beside it how it differs from the recipe: by their names."""
    system = max((s for s in kind.systems if name.startswith(s)), key=len)
    ending = name.removeprefix(system)
    values = {field.name: kind.presets[name].get(field.name, field.default) for field in _fields(kind)}
    usual = _training(kind.training[""])
    sections = {
        section: {option: value for option, value in training.items() if value != usual[section][option]}
        for section, training in _training(kind.training[ending]).items()
    }
    sections["model"] = {
        field.name: values[field.name] for field in _fields(kind) if values[field.name] != field.default
    }
    text = PRESET.format(title=_title(system, ending, values), name=name, task=kind.task)
    changes = "".join(f"{section}:\n{_lines(found)}\n" for section, found in sections.items() if found)
    if not changes:
        return {name: text}
    # Hydra fills the file that is named with fairseq's own defaults, so changes need a file of their own.
    return {name: f"{text}  - preset/{name}\n", f"preset/{name}": f"# @package _global_\n{changes}"}


def _fields(kind: Kind) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind.config) if field.name != "_name"]


def _training(row: tuple) -> dict[str, dict]:
    tokens, batch, update_freq, warmup, updates, lr = row
    return {
        "task": {} if tokens is None else dict(tokens_per_sample=tokens),
        "dataset": dict(max_tokens=batch),
        "lr_scheduler": dict(warmup_updates=warmup),
        "optimization": dict(
            max_update=updates, lr=f"[{f'{lr:.10f}'.rstrip('0')}]", update_freq=f"[{update_freq}]"
        ),
    }


def _lines(values: dict) -> str:
    return "\n".join(f"  {option}: {_as_yaml(value)}" for option, value in values.items())


def _title(system: str, ending: str, values: dict) -> str:
    title = TITLES[system] + (" with the paper's settings" if ending == "_paper" else "")
    if "encoder_layers" in values:
        return f"{title}, as many parameters as {flash_seq2seq.PAIRS[system + ending]}"
    depth = values["layers"] // (1 if values["block"] == "transformer" else 2)
    return f"{title} at the size of a {depth}-layer Transformer of width {values['embed_dim']}"


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.value if isinstance(value, enum.Enum) else value)


def main(arguments: Optional[list[str]] = None) -> None:
    """Writes all of them."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    texts = {f"recipe/{kind.task}": recipe(kind) for kind in KINDS}
    for kind in KINDS:
        for name in kind.presets:
            texts.update(presets(name, kind))
    for name, text in texts.items():
        path = CONFIGS / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    print(f"{len(texts)} files written to {CONFIGS}")


if __name__ == "__main__":
    main()
