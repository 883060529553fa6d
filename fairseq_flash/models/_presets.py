"""Every architecture of the three models as data: the paper's systems in the sizes of fairseq's models."""

import dataclasses
from typing import Any

from fairseq.models import register_model_architecture

from fairseq_flash.models._options import FlashConfig

__all__ = [
    "LANGUAGE_MODELS",
    "MASKED_LMS",
    "MASKED_LM_SYSTEMS",
    "SEQ2SEQS",
    "SEQ2SEQ_PAIRS",
    "SIZES",
    "SYSTEMS",
    "register",
]

#: By ending of the architecture's name; ``layers`` of a Transformer, for each of which stand two units.
SIZES = {
    "": dict(embed_dim=512, layers=6),
    "_tiny": dict(embed_dim=256, layers=4, chunk_size=128),
    "_gpt": dict(embed_dim=768, layers=12),
    "_big": dict(embed_dim=1024, layers=12),
}

_TRANSFORMER = dict(block="transformer", attention_dim=64)
#: The best of the candidates on source code: docs/linear-branch.md.
FLASH2 = dict(shift_keys=True, linear_norm="fading")
SYSTEMS = {
    "flash_lm": dict(),
    "flash2_lm": FLASH2,
    "flash_quad_lm": dict(attention="quadratic"),
    "flash_local_lm": dict(attention="local"),
    "flash_global_lm": dict(attention="global"),
    "transformer_plus_lm": dict(_TRANSFORMER, attention="quadratic"),
    "transformer_pp_lm": dict(_TRANSFORMER, attention="quadratic", glu=True),
    "mc_transformer_pp_lm": dict(_TRANSFORMER, attention="mixed_chunk", glu=True),
}

#: What our defaults differ in from the paper's FLASH.
PAPER = dict(init="paper", scaled_sin=True, linear_norm="chunk", relative_bias="toeplitz")


#: As ``SIZES``: of roberta_base, whose preset is empty, and a tiny one, which pairs with a roberta of 4
#: layers of 256, of 4 heads and a feed-forward width of 1152.
MASKED_LM_SIZES = {"": dict(), "_tiny": dict(embed_dim=256, layers=8, chunk_size=128)}
MASKED_LM_SYSTEMS = {"flash_masked_lm": dict(), "flash_quad_masked_lm": dict(attention="quadratic")}

#: Architectures by name, each with its difference from the model's defaults. The tiny one's chunk, by which
#: scores are divided, holds a sentence; twice as long, a toy language took more updates to learn.
SEQ2SEQS = {
    "flash_seq2seq": dict(),
    "flash_seq2seq_tiny": dict(embed_dim=256, encoder_layers=6, decoder_layers=3, chunk_size=64),
    "flash_seq2seq_wmt": dict(encoder_layers=12, decoder_layers=7),
}
#: What each has as many parameters as, within 5 %.
SEQ2SEQ_PAIRS = {
    "flash_seq2seq": "transformer_iwslt_de_en",
    "flash_seq2seq_tiny": "3 + 3 Transformer layers of 256, 4 heads, feed-forward width 1024",
    "flash_seq2seq_wmt": "transformer_wmt_en_de",
}


def _preset(choices: dict, size: dict) -> dict:
    preset = {**size, **choices}
    if "block" not in choices:
        preset["layers"] *= 2
    elif size["embed_dim"] == 256:
        # transformer_lm has no tiny size; these pair with 4 layers of 256 and a feed-forward width of 1152.
        preset["ffn_embed_dim"] = 768 if choices.get("glu") else 1152
    return {name: value for name, value in preset.items() if value != getattr(FlashConfig, name)}


#: Architectures by name, ``<system><size>``, each with its difference from the model's defaults.
LANGUAGE_MODELS = {
    **{
        f"{name}{end}": _preset(system, size)
        for name, system in SYSTEMS.items()
        for end, size in SIZES.items()
    },
    "flash_lm_paper": PAPER,
}
MASKED_LMS = {
    f"{name}{end}": {**size, **system}
    for name, system in MASKED_LM_SYSTEMS.items()
    for end, size in MASKED_LM_SIZES.items()
}


def register(model: str, config: type, presets: dict[str, dict]) -> dict[str, dict]:
    """Makes ``presets`` known to ``--arch``.

    Args:
        model: Registered name of the model, itself an architecture already, of the defaults.
        config: Its dataclass.
        presets: By name, what differs from the dataclass.

    Returns:
        The presets.
    """
    for name in presets:
        if name != model:
            register_model_architecture(model, name)(_filler(config, presets[name]))
    return presets


def _filler(config: type, preset: dict) -> Any:
    def fill(args: Any) -> None:
        """Sets every option that the user left open, or that an older checkpoint lacks."""
        for option in dataclasses.fields(config):
            if getattr(args, option.name, None) is None:
                setattr(args, option.name, preset.get(option.name, option.default))

    return fill
