"""Systems by name, ``flash+convzv+decay``: a base of the package, and what a candidate changes in it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from ablation.candidate_layers import CandidateUnit, Choice, UnplacedBlock
from fairseq_flash.models._presets import SYSTEMS
from fairseq_flash.models.flash_lm import FlashDecoder, FlashLanguageModel, FlashLanguageModelConfig
from fairseq_flash.modules import GatedAttentionUnit, Layer

__all__ = ["BASES", "CHANGES", "Size", "System", "build", "parse_system", "rates", "save"]

#: The options of the package that each base is.
BASES: dict[str, dict[str, Any]] = {
    "flash": SYSTEMS["flash_lm"],
    "flash2": SYSTEMS["flash2_lm"],
    "flash_chunk": dict(linear_norm="chunk"),
    "local": SYSTEMS["flash_local_lm"],
    "quad": SYSTEMS["flash_quad_lm"],
    "transformer_pp": SYSTEMS["transformer_pp_lm"],
    "mc_tfm_pp": SYSTEMS["mc_transformer_pp_lm"],
}
#: Those that a candidate can change, and those whose attention over the whole row holds all its scores.
OURS, ALL_SCORES = ("flash", "flash_chunk", "local"), ("quad",)

_NORM = dict(norm=True)
_DELTA = dict(norm=True, unit_length=True, delta=True)
#: What a name behind a plus changes, of the linear branch first, then of the whole unit.
OF_LINEAR: dict[str, dict[str, Any]] = {
    "norm": _NORM,
    "decay": dict(_NORM, decay="fixed"),
    "decaylearn": dict(_NORM, decay="learned"),
    "data": dict(_NORM, decay="data"),
    "fade": dict(fade=True),
    "delta": _DELTA,
    "l2": dict(unit_length=True),
    "norope": dict(plain_linear=True),
}
CHANGES: dict[str, dict[str, Any]] = {
    **OF_LINEAR,
    "shift": dict(shift="k"),
    "shiftz": dict(shift="z"),
    "conv": dict(conv="z"),
    "convzv": dict(conv="zv"),
    "sigmoid": dict(sigmoid=True),
    "randchunk": dict(random_chunk=True),
    "hybrid": dict(hybrid=True),
}
#: Layers from one softmax layer of a hybrid to the next.
PERIOD = 6


class System(NamedTuple):
    """A base, and what it has that the package has not; None for the package's own layers."""

    name: str
    base: str
    choice: Choice | None


class Size(NamedTuple):
    """Sizes that all systems share; ``layers`` counts units, a Transformer layer is as large as two."""

    embed_dim: int
    layers: int
    chunk_size: int
    attention_dim: int
    tokens_per_sample: int


def parse_system(name: str) -> System:
    """What a name means.

    Raises:
        ValueError: there is no such base or change, or they cannot be had together.
    """
    base, *changes = name.split("+")
    if base not in BASES:
        raise ValueError(f"--systems {name}: {base!r} is unknown; allowed: {', '.join(BASES)}")
    if not changes:
        return System(name, base, None)
    allowed = {"local": set(CHANGES) - set(OF_LINEAR)}.get(base, set(CHANGES)) if base in OURS else set()
    for change in changes:
        if change not in allowed:
            known = ", ".join(one for one in CHANGES if one in allowed) or "no change"
            raise ValueError(f"--systems {name}: {change!r} is not allowed with {base}; allowed: {known}")
    merged: dict[str, Any] = {}
    for change in changes:
        for field, value in CHANGES[change].items():
            if merged.setdefault(field, value) != value:
                raise ValueError(f"--systems {name}: {change!r} is another {field}; allowed: one of them")
    return System(name, base, Choice(**merged))


def rates(text: str, systems: list[str]) -> dict[str, list[float]]:
    """The rates of each system.

    Raises:
        ValueError: one has none, or is no number above 0, or there is no such system.
    """
    named: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        named[name] = value
    unknown = set(named) - {"", *systems}
    if unknown:
        raise ValueError(f"--lr {', '.join(sorted(unknown))}= is none of --systems {','.join(systems)}")
    found = {}
    for name in systems:
        value = named.get(name, named.get(""))
        try:
            found[name] = [float(rate) for rate in (value or "").split("/")]
        except ValueError:
            raise ValueError(f"--lr has {value!r} for {name}; allowed: a number, or several with /") from None
        if not all(0 < rate < float("inf") for rate in found[name]):
            raise ValueError(f"--lr {value} of {name} is not allowed; allowed: above 0")
    return found


def build(system: System, size: Size, dictionary: Dictionary) -> FlashDecoder:
    """The language model of a system, without dropout, with the package's start of the weights.

    Args:
        system: From :func:`parse_system`.
        size: Of the model.
        dictionary: Of its tokens.

    Returns:
        The decoder; ``stack`` turns tokens into features, ``output_layer`` these into logits.
    """
    options = dict(BASES[system.base])
    transformer = options.get("block") == "transformer"
    if not transformer or size.embed_dim % options["attention_dim"]:
        options["attention_dim"] = size.attention_dim
    rows = SimpleNamespace(tokens_per_sample=size.tokens_per_sample)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, cfg=rows)
    cfg = FlashLanguageModelConfig(
        embed_dim=size.embed_dim,
        layers=max(1, size.layers // 2) if transformer else size.layers,
        chunk_size=size.chunk_size,
        dropout=0.0,
        # In the same arithmetic as the candidates, which have no kernels.
        backend="reference",
        share_decoder_input_output_embed=True,
        **options,
    )
    decoder = FlashLanguageModel.build_model(cfg, task).decoder
    decoder.built_from = cfg
    if system.choice is not None:
        blocks = decoder.stack.blocks
        period = min(PERIOD, len(blocks))
        for index, block in enumerate(blocks):
            softmax = system.choice.hybrid and index % period == period - 1
            blocks[index] = _softmax_block(block) if softmax else _changed(block, system.choice)
    return decoder


def save(path: Path, model: FlashDecoder, size: Size, data: Path) -> None:
    """Writes a model of the package's own layers as fairseq-train does, for yardsticks.py to read.

    Args:
        path: The file; folders are made.
        model: From :func:`build`.
        size: Of it.
        data: What it was trained on.
    """
    # Needs the extra hf, which nothing else here does.
    from fairseq_flash.export.read import save_checkpoint

    task = dict(_name="language_modeling", data=str(data), tokens_per_sample=size.tokens_per_sample)
    options = {**dataclasses.asdict(model.built_from), "_name": "flash_lm"}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.nn.ModuleDict({"decoder": model})
    save_checkpoint(path, OmegaConf.create({"task": task, "model": options}), whole)


def _changed(block: GatedAttentionUnit, choice: Choice) -> Layer:
    """A candidate that starts with the weights of the package's unit."""
    options = dict(
        attention=block.attention,
        expansion_factor=block.expanded_dim // block.embed_dim,
        attention_dim=block.attention_dim,
        chunk_size=block.chunk_size,
        linear_norm=block.linear_norm,
        norm=block.norm_name,
        init=block.init,
    )
    with torch.random.fork_rng(devices=[]):
        changed = CandidateUnit(block.embed_dim, choice, **options)
    changed.load_state_dict(block.state_dict(), strict=False)
    return changed


def _softmax_block(block: GatedAttentionUnit) -> Layer:
    """A Transformer layer with as many parameters as the unit, whose feed-forward network is the rest."""
    d = block.embed_dim
    rest = sum(map(torch.numel, block.parameters())) - 4 * d * d
    options = dict(ffn_embed_dim=8 * max(1, round(rest / (3 * d) / 8)), glu=True)
    softmax = UnplacedBlock(
        d, attention_dim=block.attention_dim, init="paper", norm=block.norm_name, **options
    )
    with torch.no_grad():
        for linear in (softmax.out, softmax.ffn_out):
            # To what units add at the start: more would drown embeddings of 0.02.
            linear.weight.mul_(0.1)
    return softmax


def describe(system: System) -> str:
    """The choice in words, for a log."""
    if system.choice is None:
        return f"{system.base}, the package's layers"
    changed = {
        field.name: getattr(system.choice, field.name)
        for field in dataclasses.fields(Choice)
        if getattr(system.choice, field.name) != field.default
    }
    return f"{system.base} with {changed}"
