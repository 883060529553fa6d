"""The systems that are compared, at sizes of equal parameters, as options of fairseq-train."""

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_flash.models.flash_lm import FlashLanguageModel

__all__ = ["BASELINE", "SIZES", "architecture", "check_systems", "systems_of", "with_pooling"]

#: What the others are compared with: fairseq's own Transformer.
BASELINE = "transformer_lm"

#: Endings of the architectures' names.
SIZES = {"tiny": "_tiny", "base": "", "gpt": "_gpt", "big": "_big"}

#: fairseq has no tiny Transformer; this one pairs with ours. Its embeddings would otherwise be 512 wide.
TINY_TRANSFORMER = (
    *("--decoder-layers", "4", "--decoder-embed-dim", "256", "--decoder-ffn-embed-dim", "1152"),
    *("--decoder-attention-heads", "4", "--decoder-input-dim", "256", "--decoder-output-dim", "256"),
)
#: fairseq's default, a norm after each layer, hardly learns within a few million tokens: docs/ablation.md.
PRE_NORM = "--decoder-normalize-before"


def architecture(system: str, size: str) -> list[str]:
    """The model's options, as fairseq-train takes them.

    Args:
        system: A language model of ours or of fairseq, without the size's ending.
        size: One of ``SIZES``.

    Returns:
        Words that begin with ``--arch``; input and output embeddings are shared.

    Raises:
        ValueError: there is no such size, or no such system in that size.
    """
    if size not in SIZES:
        raise ValueError(f"--size {size} is unknown; allowed: {', '.join(SIZES)}")
    if system not in systems_of(size):
        allowed = ", ".join(systems_of(size))
        raise ValueError(f"--systems {system} is unknown in --size {size}; allowed: {allowed}")
    tiny = (system, size) == (BASELINE, "tiny")
    name = [BASELINE, *TINY_TRANSFORMER] if tiny else [system + SIZES[size]]
    norm = [PRE_NORM] if system == BASELINE else []
    return ["--arch", *name, *norm, "--share-decoder-input-output-embed"]


def systems_of(size: str) -> list[str]:
    """What :func:`architecture` takes as a system of that size."""
    ending = SIZES[size]
    whole = [
        name
        for name, model in ARCH_MODEL_REGISTRY.items()
        if name.endswith(f"_lm{ending}") and issubclass(model, (FlashLanguageModel, TransformerLanguageModel))
    ]
    return sorted({name.removesuffix(ending) for name in whole} | {BASELINE})


def check_systems(systems: list[str], size: str) -> None:
    """Refuses systems that do not exist, or that are named twice.

    Raises:
        ValueError: there are such.
    """
    for system in systems:
        architecture(system, size)
    twice = sorted({system for system in systems if systems.count(system) > 1})
    if twice:
        raise ValueError(f"--systems names {', '.join(twice)} twice; allowed: each once")


def with_pooling(words: tuple, kind: str, pooling: str) -> tuple:
    """The words of a fine-tuning whose head sees more than the first token."""
    if pooling == "first":
        return words
    place, pooled = words.index("--arch") + 1, "pooled_" if kind == "roberta" else ""
    return (*words[:place], pooled + words[place], "--pooling", pooling, *words[place + 1 :])
