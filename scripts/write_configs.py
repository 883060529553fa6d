"""Writes fairseq_flash/configs/*.yaml: one hydra file for each architecture, every option in it.

    python scripts/write_configs.py

fairseq's hydra ignores architecture names, so their options are written out; run it again after an option or
an architecture changed (the tests compare the files with what ``--arch`` builds).
"""

import dataclasses
import enum
from pathlib import Path
from typing import Any, NamedTuple

from fairseq_flash.models import flash_lm, flash_masked_lm, flash_seq2seq
from fairseq_flash.models._presets import MASKED_LM_SYSTEMS, SYSTEMS

CONFIGS = Path(__file__).resolve().parent.parent / "fairseq_flash" / "configs"

TITLES = {
    "flash_lm": "FLASH",
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

BLOCKS = """\
  sample_break_mode: none
  tokens_per_sample: {tokens_per_sample}"""
SENTENCES = """\
  source_lang: null
  target_lang: null"""
SMOOTHED = """label_smoothed_cross_entropy
  label_smoothing: 0.1"""


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
        *(SEQ2SEQ_TRAINING, "translation", SMOOTHED),
    ),
)

TEMPLATE = """\
# {title}.
#   fairseq-hydra-train --config-dir fairseq_flash/configs --config-name {name} \\
#     task.data=/path/to/data-bin common.user_dir=/path/to/fairseq_flash
# Both paths absolute: hydra runs in a folder of its own, outputs/<date>/<time>. The values under `model` are
# those of --arch {name}; hydra ignores architecture names, so they are written out.

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
  lr: [{lr}]
  clip_norm: 1.0
  update_freq: [{update_freq}]
model:
  _name: {model}
{options}
"""


def render(name: str, kind: Kind) -> str:
    """The yaml of one architecture."""
    system = max((s for s in kind.systems if name.startswith(s)), key=len)
    ending = name.removeprefix(system)
    tokens, batch, update_freq, warmup, updates, lr = kind.training[ending]
    fields = [field for field in dataclasses.fields(kind.config) if field.name != "_name"]
    values = {field.name: kind.presets[name].get(field.name, field.default) for field in fields}
    return TEMPLATE.format(
        title=_title(system, ending, values),
        name=name,
        task=kind.task,
        criterion=kind.criterion,
        model=kind.model,
        rows=SENTENCES if tokens is None else BLOCKS.format(tokens_per_sample=tokens),
        max_tokens=batch,
        update_freq=update_freq,
        warmup_updates=warmup,
        max_update=updates,
        lr=f"{lr:.10f}".rstrip("0"),
        options="\n".join(f"  {option}: {_as_yaml(value)}" for option, value in values.items()),
    )


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


def main() -> None:
    """Writes all of them."""
    written = [(name, kind) for kind in KINDS for name in kind.presets]
    for name, kind in written:
        (CONFIGS / f"{name}.yaml").write_text(render(name, kind))
    print(f"{len(written)} files written to {CONFIGS}")


if __name__ == "__main__":
    main()
