"""The systems of the paper as presets of one model, in the sizes of fairseq's own models."""

from fairseq_flash.models._config import FlashConfig

__all__ = ["architectures", "masked_lm_architectures"]

#: By ending of the architecture's name; ``layers`` of a Transformer, for each of which stand two units.
SIZES = {
    "": dict(embed_dim=512, layers=6),
    "_tiny": dict(embed_dim=256, layers=4, chunk_size=128),
    "_gpt": dict(embed_dim=768, layers=12),
    "_big": dict(embed_dim=1024, layers=12),
}

_TRANSFORMER = dict(block="transformer", attention_dim=64)
SYSTEMS = {
    "flash_lm": dict(),
    "flash_quad_lm": dict(attention="quadratic"),
    "flash_local_lm": dict(attention="local"),
    "flash_global_lm": dict(attention="global"),
    "transformer_plus_lm": dict(_TRANSFORMER, attention="quadratic"),
    "transformer_pp_lm": dict(_TRANSFORMER, attention="quadratic", glu=True),
    "mc_transformer_pp_lm": dict(_TRANSFORMER, attention="mixed_chunk", glu=True),
}

#: What our defaults differ in from the paper's FLASH.
PAPER = dict(init="paper", scaled_sin=True, linear_norm="chunk", relative_bias="toeplitz")


def architectures() -> dict[str, dict]:
    """Every architecture with the options in which it differs from the model's defaults.

    Returns:
        By name, ``<system><size>``; ``flash_lm`` itself is the model's defaults, an empty preset.
    """
    presets = {
        f"{system}{ending}": _preset(choices, size)
        for system, choices in SYSTEMS.items()
        for ending, size in SIZES.items()
    }
    presets["flash_lm_paper"] = dict(PAPER)
    return presets


#: As ``SIZES``: of roberta_base, whose preset is empty, and a tiny one.
MASKED_LM_SIZES = {"": dict(), "_tiny": dict(embed_dim=256, layers=8, chunk_size=128)}
MASKED_LM_SYSTEMS = {"flash_masked_lm": dict(), "flash_quad_masked_lm": dict(attention="quadratic")}


def masked_lm_architectures() -> dict[str, dict]:
    """As :func:`architectures`, of ``flash_masked_lm``.

    The tiny ones pair with a roberta of 4 layers of 256, of 4 heads and a feed-forward width of 1152.
    """
    return {
        f"{system}{ending}": {**size, **choices}
        for system, choices in MASKED_LM_SYSTEMS.items()
        for ending, size in MASKED_LM_SIZES.items()
    }


def _preset(choices: dict, size: dict) -> dict:
    preset = {**size, **choices}
    if "block" not in choices:
        preset["layers"] *= 2
    elif size["embed_dim"] == 256:
        # transformer_lm has no tiny size; these pair with 4 layers of 256 and a feed-forward width of 1152.
        preset["ffn_embed_dim"] = 768 if choices.get("glu") else 1152
    return {name: value for name, value in preset.items() if value != getattr(FlashConfig, name)}
