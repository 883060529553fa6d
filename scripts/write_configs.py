"""Writes fairseq_flash/configs/*.yaml: one hydra file for each architecture of flash_lm, every option in it.

    python scripts/write_configs.py

fairseq's hydra ignores architecture names, so their options are written out; run it again after an option or
an architecture changed (the tests compare the files with what ``--arch`` builds).
"""

import dataclasses
import enum
from pathlib import Path
from typing import Any

from fairseq_flash.models._systems import SYSTEMS
from fairseq_flash.models.flash_lm import PRESETS, FlashLanguageModelConfig

CONFIGS = Path(__file__).resolve().parent.parent / "fairseq_flash" / "configs"

TITLES = {
    "flash_lm": "FLASH",
    "flash_quad_lm": "FLASH-Quad",
    "flash_local_lm": "FLASH LocalOnly",
    "flash_global_lm": "FLASH GlobalOnly",
    "transformer_plus_lm": "Transformer+ (rotary positions)",
    "transformer_pp_lm": "Transformer++ (rotary positions, gated feed-forward network)",
    "mc_transformer_pp_lm": "MC-TFM++ (Transformer++ with mixed chunk attention)",
}

#: By ending: tokens a row, tokens a batch, batches an update, warm-up updates, updates, learning rate.
TRAINING = {
    "": (1024, 8192, 1, 4000, 100000, 5e-4),
    "_tiny": (512, 4096, 1, 500, 10000, 4e-3),
    "_gpt": (1024, 8192, 4, 4000, 100000, 5e-4),
    "_big": (1024, 4096, 8, 4000, 100000, 3e-4),
    "_paper": (1024, 8192, 1, 4000, 100000, 5e-4),
}

TEMPLATE = """\
# {title} at the size of a {depth}-layer Transformer of width {width}.
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
  _name: language_modeling
  data: ???
  sample_break_mode: none
  tokens_per_sample: {tokens_per_sample}
dataset:
  max_tokens: {max_tokens}
  num_workers: 2
criterion:
  _name: cross_entropy
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
  _name: flash_lm
{options}
"""


def render(name: str) -> str:
    """The yaml of one architecture."""
    system = max((s for s in SYSTEMS if name.startswith(s)), key=len)
    ending = name.removeprefix(system)
    tokens, batch, update_freq, warmup, updates, lr = TRAINING[ending]
    fields = [field for field in dataclasses.fields(FlashLanguageModelConfig) if field.name != "_name"]
    values = {field.name: PRESETS[name].get(field.name, field.default) for field in fields}
    return TEMPLATE.format(
        title=TITLES[system] + (" with the paper's settings" if ending == "_paper" else ""),
        depth=values["layers"] // (1 if values["block"] == "transformer" else 2),
        width=values["embed_dim"],
        name=name,
        tokens_per_sample=tokens,
        max_tokens=batch,
        update_freq=update_freq,
        warmup_updates=warmup,
        max_update=updates,
        lr=f"{lr:.10f}".rstrip("0"),
        options="\n".join(f"  {option}: {_as_yaml(value)}" for option, value in values.items()),
    )


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.value if isinstance(value, enum.Enum) else value)


def main() -> None:
    """Writes all of them."""
    for name in PRESETS:
        (CONFIGS / f"{name}.yaml").write_text(render(name))
    print(f"{len(PRESETS)} files written to {CONFIGS}")


if __name__ == "__main__":
    main()
