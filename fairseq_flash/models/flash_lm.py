"""flash_lm: a causal language model of gated attention units."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import (
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
    register_model,
    register_model_architecture,
)
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from torch import nn

from fairseq_flash.models._config import FlashConfig, build_block, fill_preset, parse_cutoffs
from fairseq_flash.models._diagnostics import watch_layers
from fairseq_flash.models._systems import architectures
from fairseq_flash.modules import DecodingState, GatedAttentionUnit, RowMemory, Stack

__all__ = [
    "FlashDecoder",
    "FlashLanguageModel",
    "FlashLanguageModelConfig",
    "adopt_n_ref",
    "normalized_probs",
]

#: Ours have no maximum; fairseq wants an integer, and silently skips rows beyond it.
NO_MAXIMUM = 2**30


@dataclass
class FlashLanguageModelConfig(FlashConfig):
    """Options of ``--arch flash_lm``; names as in ``transformer_lm`` where it has them."""

    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    adaptive_input: bool = field(default=False, metadata={"help": "if set, uses adaptive input"})
    adaptive_input_factor: float = field(default=4, metadata={"help": "adaptive input factor"})
    adaptive_input_cutoff: Optional[str] = field(
        default=None, metadata={"help": "comma separated list of adaptive input cutoff points"}
    )
    adaptive_softmax_cutoff: Optional[str] = field(
        default=None,
        metadata={"help": "comma separated list of adaptive softmax cutoff points, for adaptive_loss"},
    )
    adaptive_softmax_dropout: float = field(
        default=0, metadata={"help": "dropout of the adaptive softmax's tail projections"}
    )
    adaptive_softmax_factor: float = field(default=4, metadata={"help": "adaptive softmax factor"})
    tie_adaptive_weights: bool = field(
        default=False, metadata={"help": "tie the weights of adaptive softmax and adaptive input"}
    )
    tie_adaptive_proj: bool = field(
        default=False, metadata={"help": "tie the projections of adaptive softmax and adaptive input"}
    )


class FlashDecoder(FairseqIncrementalDecoder):
    """A causal FLASH stack as a fairseq decoder.

    With an ``incremental_state``, fairseq passes the whole prefix at every step: only new tokens are
    computed, all at once, on a state of constant size.

    Args:
        cfg: The options.
        dictionary: Of the output.
        embed_tokens: From tokens ``(b, n)`` to ``(b, n, d)``.
        n_ref: Resolved length that causal quadratic scores are divided by.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    def __init__(
        self, cfg: FlashLanguageModelConfig, dictionary: Dictionary, embed_tokens: nn.Module, n_ref: int
    ) -> None:
        super().__init__(dictionary)
        if cfg.layers < 1:
            raise ValueError(f"--layers {cfg.layers} is not allowed; allowed: 1 or more")
        self.padding_idx = embed_tokens.padding_idx
        self.n_ref_is_default = cfg.n_ref is None
        self.stack = Stack(
            embed_tokens,
            [self.build_layer(cfg, n_ref) for _ in range(cfg.layers)],
            embed_dim=cfg.embed_dim,
            attention_dim=cfg.attention_dim,
            norm=str(cfg.norm),
            scaled_sin=cfg.scaled_sin,
            embed_scale=_embed_scale(cfg),
            dropout=cfg.dropout,
        )
        self.adaptive_softmax = self.output_projection = None
        if cfg.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = _build_adaptive_softmax(cfg, len(dictionary), embed_tokens)
        else:
            self.output_projection = nn.Linear(cfg.embed_dim, len(dictionary), bias=False)
            nn.init.normal_(self.output_projection.weight, std=0.02)
            if cfg.share_decoder_input_output_embed:
                self.output_projection.weight = embed_tokens.weight

    def build_layer(self, cfg: FlashConfig, n_ref: int) -> nn.Module:
        """A causal layer as the options ask for."""
        return build_block(cfg, causal=True, n_ref=n_ref)

    def forward(
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Any = None,
        incremental_state: Optional[dict[str, Any]] = None,
        features_only: bool = False,
        memory: Optional[RowMemory] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Predicts the next token at every position.

        Args:
            prev_output_tokens: ``(b, n)``; padding leads or trails.
            encoder_out: Ignored: a language model has no encoder.
            incremental_state: fairseq's, during generation; then only the last position is returned.
            features_only: Whether to stop before the vocabulary.
            memory: Where rows that continue earlier ones find their state, and leave it; without
                ``incremental_state``.
            unused: What fairseq passes to every model, such as ``src_lengths``.

        Returns:
            Logits ``(b, n, vocabulary)``, or features ``(b, n, d)`` with ``features_only`` or an adaptive
            softmax; and None, in place of attention weights.

        Raises:
            ValueError: padding in the middle of a row, or a row longer than a Toeplitz table.
        """
        x, extra = self.extract_features(prev_output_tokens, encoder_out, incremental_state, memory)
        return (x if features_only else self.output_layer(x)), extra

    def extract_features(
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Any = None,
        incremental_state: Optional[dict[str, Any]] = None,
        memory: Optional[RowMemory] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """As :meth:`forward` with ``features_only``."""
        if incremental_state is not None:
            return self._advance(prev_output_tokens, incremental_state), None
        state = None if memory is None else memory.recall(self.stack, prev_output_tokens)
        features, state = self.stack(prev_output_tokens, prev_output_tokens.eq(self.padding_idx), state)
        if memory is not None:
            memory.remember(self.stack, state)
        return features, None

    def output_layer(self, features: torch.Tensor, **unused: Any) -> torch.Tensor:
        """Projects features ``(b, n, d)`` to the vocabulary; an adaptive softmax does so in the criterion."""
        return features if self.output_projection is None else self.output_projection(features)

    def get_normalized_probs(
        self, net_output: tuple[torch.Tensor, Any], log_probs: bool, sample: Optional[dict[str, Any]] = None
    ) -> torch.Tensor:
        """Probabilities of the next token, in float32 or wider (fairseq's own narrows float64)."""
        if self.adaptive_softmax is not None:
            if self.training:
                raise ValueError(
                    "--adaptive-softmax-cutoff cannot train with this --criterion; allowed: adaptive_loss"
                )
            return super().get_normalized_probs(net_output, log_probs, sample)
        return normalized_probs(net_output[0], log_probs)

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: torch.Tensor) -> None:
        """Picks the rows of the state for the beams that go on."""
        key = self._get_full_incremental_state_key("flash")
        if key not in incremental_state:
            return
        consumed, state = incremental_state[key]
        # Without beams the order stays: a look costs less than a copy, but would make a device wait.
        if new_order.is_cpu and torch.equal(new_order, torch.arange(state.position.shape[0])):
            return
        incremental_state[key] = consumed, state.reorder(new_order)

    def continue_from(self, incremental_state: dict[str, Any], state: DecodingState) -> None:
        """Lets generation go on after tokens that were read before, such as a long prompt.

        Args:
            incremental_state: A fresh one; the tokens passed with it are those after ``state``.
            state: From the stack, one row a hypothesis; overwritten by the generation.
        """
        incremental_state[self._get_full_incremental_state_key("flash")] = 0, state

    def max_positions(self) -> int:
        """No maximum."""
        return NO_MAXIMUM

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Takes over the checkpoint's ``n_ref`` where the user gave none: scores stay as trained."""
        if self.n_ref_is_default:
            adopt_n_ref(self.stack, state_dict, f"{name}.stack")
        return state_dict

    def _advance(
        self, tokens: torch.Tensor, incremental_state: dict[str, Any], **source: Optional[torch.Tensor]
    ) -> torch.Tensor:
        key = self._get_full_incremental_state_key("flash")
        consumed, state = incremental_state.get(key) or (0, self.stack.empty_state(tokens, **source))
        if tokens.shape[1] <= consumed:
            raise ValueError(
                f"prev_output_tokens has {tokens.shape[1]} tokens, incremental_state has seen {consumed}; "
                "allowed: the whole prefix with at least one new token, or a fresh incremental_state"
            )
        new = tokens[:, consumed:]
        # A single new token is never padding: no look at the device for each step.
        padding_mask = None if new.shape[1] == 1 else new.eq(self.padding_idx)
        features, state = self.stack(new, padding_mask, state)
        incremental_state[key] = tokens.shape[1], state
        return features[:, -1:]


@register_model("flash_lm", dataclass=FlashLanguageModelConfig)
class FlashLanguageModel(FairseqLanguageModel):
    """FLASH as a language model: trains in linear time, generates at constant cost per token.

    Source: Hua et al. 2022, section 4.
    """

    @classmethod
    def build_model(cls, cfg: FlashLanguageModelConfig, task: Any) -> "FlashLanguageModel":
        """Builds the model for a task with a ``source_dictionary`` and a ``target_dictionary``.

        Raises:
            ValueError: an option has a value that is not allowed.
        """
        embed_tokens = _build_embedding(cfg, task.source_dictionary)
        model = cls(FlashDecoder(cfg, task.target_dictionary, embed_tokens, _resolve_n_ref(cfg, task)))
        watch_layers(model, model.decoder.stack.blocks, cfg.diagnostics_interval)
        return model


def adopt_n_ref(stack: Stack, state_dict: dict[str, Any], name: str) -> None:
    """Sets the ``n_ref`` of a stack's quadratic layers to that of a checkpoint, in which it is ``name``."""
    for path, module in stack.named_modules():
        stored = state_dict.get(f"{name}.{path}.n_ref")
        if stored is not None and isinstance(module, GatedAttentionUnit) and module.attention == "quadratic":
            module.set_n_ref(int(stored))


def normalized_probs(logits: torch.Tensor, log_probs: bool) -> torch.Tensor:
    """Probabilities, or their logarithms, over the last axis, in float32 or wider."""
    function = torch.log_softmax if log_probs else torch.softmax
    return function(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _resolve_n_ref(cfg: FlashLanguageModelConfig, task: Any) -> int:
    options = getattr(task, "cfg", None) or getattr(task, "args", None)
    names = ("tokens_per_sample", "max_positions", "max_target_positions")
    candidates = [cfg.n_ref, *(getattr(options, name, None) for name in names)]
    return next((n for n in candidates if isinstance(n, int)), 1024)


def _build_embedding(cfg: FlashLanguageModelConfig, dictionary: Dictionary) -> nn.Module:
    if cfg.embed_dim < 1 or cfg.embed_dim % 2:
        raise ValueError(f"--embed-dim {cfg.embed_dim} is not allowed; allowed: even numbers from 2 on")
    _check_adaptive(cfg)
    if cfg.adaptive_input:
        cutoffs = parse_cutoffs("adaptive_input_cutoff", cfg.adaptive_input_cutoff, len(dictionary))
        return AdaptiveInput(
            len(dictionary),
            dictionary.pad(),
            cfg.embed_dim,
            cfg.adaptive_input_factor,
            cfg.embed_dim,
            cutoffs,
        )
    embedding = nn.Embedding(len(dictionary), cfg.embed_dim, padding_idx=dictionary.pad())
    std = 1 / _embed_scale(cfg) if cfg.block == "transformer" else 0.02
    nn.init.normal_(embedding.weight, std=std)
    nn.init.zeros_(embedding.weight[dictionary.pad()])
    return embedding


def _embed_scale(cfg: FlashLanguageModelConfig) -> float:
    """As in transformer_lm; Transformer layers add about one to their input at the start."""
    return cfg.embed_dim**0.5 if cfg.block == "transformer" else 1.0


def _check_adaptive(cfg: FlashLanguageModelConfig) -> None:
    """Refuses what would be ignored, or would fail only during training."""
    tied = cfg.tie_adaptive_weights or cfg.tie_adaptive_proj
    inputs = (cfg.adaptive_input_cutoff, cfg.adaptive_input_factor)
    outputs = (cfg.adaptive_softmax_cutoff, cfg.adaptive_softmax_factor)
    if tied and not (cfg.tie_adaptive_weights and cfg.adaptive_input and inputs == outputs):
        raise ValueError(
            "--tie-adaptive-weights (without which --tie-adaptive-proj has no effect) needs --adaptive-input "
            f"with the cutoffs and factor of the adaptive softmax; got {inputs} and {outputs}"
        )
    if cfg.share_decoder_input_output_embed and (cfg.adaptive_input or cfg.adaptive_softmax_cutoff):
        raise ValueError(
            "--share-decoder-input-output-embed is not allowed with adaptive input or softmax; allowed: "
            "--tie-adaptive-weights"
        )
    if cfg.adaptive_input_cutoff and not cfg.adaptive_input:
        raise ValueError(f"--adaptive-input-cutoff {cfg.adaptive_input_cutoff} needs --adaptive-input")
    for name, factor in (("input", cfg.adaptive_input_factor), ("softmax", cfg.adaptive_softmax_factor)):
        if factor < 1:
            raise ValueError(f"--adaptive-{name}-factor {factor} is not allowed; allowed: 1 or more")
    if not 0 <= cfg.adaptive_softmax_dropout < 1:
        raise ValueError(
            f"--adaptive-softmax-dropout {cfg.adaptive_softmax_dropout} is not allowed; allowed: 0 to below 1"
        )


def _build_adaptive_softmax(
    cfg: FlashLanguageModelConfig, vocabulary: int, embed_tokens: nn.Module
) -> AdaptiveSoftmax:
    return AdaptiveSoftmax(
        vocabulary,
        cfg.embed_dim,
        parse_cutoffs("adaptive_softmax_cutoff", cfg.adaptive_softmax_cutoff, vocabulary),
        dropout=cfg.adaptive_softmax_dropout,
        adaptive_inputs=embed_tokens if cfg.tie_adaptive_weights else None,
        factor=cfg.adaptive_softmax_factor,
        tie_proj=cfg.tie_adaptive_proj,
    )


#: Architectures by name, each with its difference from the model's defaults.
PRESETS = architectures()


def _register(name: str, preset: dict) -> None:
    @register_model_architecture("flash_lm", name)
    def fill(args: Any) -> None:
        fill_preset(args, FlashLanguageModelConfig, preset)


for _name, _preset in PRESETS.items():
    # The model's own name is an architecture already, of the defaults.
    if _name != "flash_lm":
        _register(_name, _preset)
