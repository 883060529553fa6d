"""What options and weights are called here, and what in transformers."""

from typing import Any

from fairseq_flash.models.flash_lm import FlashLanguageModel
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM

__all__ = ["CLASSES", "FILES", "MODEL_TYPE", "PREFIXES", "TASKS", "TIED", "options_of", "settings_of"]

MODEL_TYPE = "fairseq_flash"
CLASSES = {FlashLanguageModel: "FlashForCausalLM", FlashMaskedLM: "FlashForMaskedLM"}
#: Of the files that are read as they stand.
FILES = ("dict.txt", "sentencepiece.bpe.model")
#: Of weights, by class: here and there.
PREFIXES = {
    FlashLanguageModel: {"decoder.stack.": "model.", "decoder.output_projection.": "lm_head."},
    FlashMaskedLM: {"encoder.stack.": "model.", "encoder.lm_head.": "lm_head."},
}
#: The weight of the output, and the embedding that it may share: in transformers.
TIED = ("lm_head.weight", "model.embed_tokens.weight")
#: The task and architecture of an imported model.
TASKS = {
    FlashLanguageModel: ("language_modeling", "flash_lm"),
    FlashMaskedLM: ("masked_lm", "flash_masked_lm"),
}
#: Options that have a name there, with the type that they have.
NAMES = {
    "embed_dim": ("hidden_size", int),
    "layers": ("num_hidden_layers", int),
    "expansion_factor": ("expansion_factor", int),
    "attention_dim": ("attention_dim", int),
    "chunk_size": ("chunk_size", int),
    "attention": ("attention", str),
    "linear_norm": ("linear_norm", str),
    "norm": ("norm", str),
    "relative_bias": ("relative_bias", str),
    "scaled_sin": ("scaled_sin", bool),
    "shift_keys": ("shift_keys", bool),
}
#: What ``config.json`` of earlier exports does not say, and means.
UNSAID = {"shift_keys": False}
#: Options that must have one value, as nothing there computes the others.
ONLY = {
    "block": "gau",
    "adaptive_input": False,
    "adaptive_input_cutoff": None,
    "adaptive_softmax_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
}
#: Whether the output shares the embedding: the option that says so, and what it says.
SHARING = {"share_decoder_input_output_embed": True, "untie_weights_roberta": False}


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config.json`` that says what is computed.

    Args:
        options: Those that a model was trained with, as it remembers them.

    Returns:
        Plain values by their names in transformers.

    Raises:
        ValueError: an option has a value that the modelling file does not compute.
    """
    # What has no effect is not remembered: any value will do.
    found = dict(chunk_size=1, linear_norm="mean", relative_bias="rotary")
    for name, value in options.items():
        if name in NAMES:
            there, kind = NAMES[name]
            found[there] = kind(value)
        elif name in SHARING:
            found["tie_word_embeddings"] = bool(value) == SHARING[name]
        # Pooling is of classification heads, which stay behind.
        elif name != "pooling" and (name not in ONLY or value != ONLY[name]):
            allowed = f"{_flag(name)} {ONLY[name]}" if ONLY.get(name) else f"without {_flag(name)}"
            raise ValueError(f"a model of {_flag(name)} {value} cannot be exported; allowed: {allowed}")
    return found


def options_of(settings: dict[str, Any], sharing: str) -> dict[str, Any]:
    """Undoes :func:`settings_of`.

    Args:
        settings: The content of ``config.json``.
        sharing: The name of the option that says whether the output shares the embedding.

    Raises:
        ValueError: a value is missing or has another type.
    """
    found, settings = {}, {**UNSAID, **settings}
    for name, (there, kind) in NAMES.items():
        if type(settings.get(there)) is not kind:
            raise ValueError(f"config.json: {there} is {settings.get(there)!r}; allowed: {kind.__name__}")
        found[name] = settings[there]
    if found["attention"] == "global":  # which has no scores to be biased
        del found["relative_bias"]
    tied = settings.get("tie_word_embeddings", True)
    if type(tied) is not bool:
        raise ValueError(f"config.json: tie_word_embeddings is {tied!r}; allowed: bool")
    return {**found, sharing: tied == SHARING[sharing]}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
