"""flash_lm: a causal language model of gated attention units."""

from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from torch import distributed, nn

from fairseq_flash.models._diagnostics import watch_layers
from fairseq_flash.models._embedding import build_adaptive_softmax, build_input, padding_as_words
from fairseq_flash.models._layers import build_stack, compile_objections, resolve_n_ref
from fairseq_flash.models._loss import LazyLogits, resolve_loss
from fairseq_flash.models._option_checks import check_sizes
from fairseq_flash.models._options import NO_MAXIMUM, FlashLanguageModelConfig
from fairseq_flash.models._presets import LANGUAGE_MODELS, register
from fairseq_flash.models._trained import RememberingModel
from fairseq_flash.modules import DecodingState, RowMemory, StepGraphs

__all__ = ["PRESETS", "FlashDecoder", "FlashLanguageModel", "FlashLanguageModelConfig", "normalized_probs"]


#: Of fairseq's criterions, those that a model of the next word can be trained with.
NEXT_WORD = ("cross_entropy", "label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_rdrop")


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

    #: Whether each layer attends to a source as well.
    reads_source = False
    #: Whether there are weights that align words, as ``--print-alignment`` needs them.
    has_attention_weights = False

    def __init__(
        self, cfg: FlashLanguageModelConfig, dictionary: Dictionary, embed_tokens: nn.Module, n_ref: int
    ) -> None:
        super().__init__(dictionary)
        self.padding_idx = embed_tokens.padding_idx
        self.stack = build_stack(cfg, embed_tokens, causal=True, n_ref=n_ref, reads_source=self.reads_source)
        self.adaptive_softmax = self.output_projection = None
        if cfg.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = build_adaptive_softmax(cfg, len(dictionary), embed_tokens)
        else:
            self.output_projection = nn.Linear(cfg.embed_dim, len(dictionary), bias=False)
            nn.init.normal_(self.output_projection.weight, std=0.02)
            if cfg.share_decoder_input_output_embed:
                self.output_projection.weight = embed_tokens.weight
        self.vocabulary_loss = resolve_loss(cfg, compile_objections)
        self.step_graphs = None if cfg.no_graph else StepGraphs()

    def forward(
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Any = None,
        incremental_state: Optional[dict[str, Any]] = None,
        features_only: bool = False,
        memory: Optional[RowMemory] = None,
        group: Optional[distributed.ProcessGroup] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Predicts the next token at every position.

        Args:
            prev_output_tokens: ``(b, n)``; padding leads or trails, and is a word elsewhere.
            encoder_out: Ignored: a language model has no encoder.
            incremental_state: fairseq's, during generation; then only the last position is returned.
            features_only: Whether to stop before the vocabulary.
            memory: Where rows that continue earlier ones find their state, and leave it; without
                ``incremental_state``.
            group: The processes that each hold a part of the rows, as
                :func:`~fairseq_flash.modules.part_of_rows` cuts them; None for whole rows.
            unused: What fairseq passes to every model, such as ``src_lengths``.

        Returns:
            Logits ``(b, n, vocabulary)``, or features ``(b, n, d)`` with ``features_only`` or an adaptive
            softmax; and None, in place of attention weights.

        Raises:
            ValueError: a row is longer than a Toeplitz table, or the layers cannot share rows in a group.
        """
        x, extra = self.extract_features(
            prev_output_tokens, encoder_out, incremental_state, memory, group=group
        )
        if features_only:
            return x, extra
        if self.training and self.vocabulary_loss != "plain" and self.output_projection is not None:
            return LazyLogits(x, self.output_projection.weight, self.vocabulary_loss), extra
        return self.output_layer(x), extra

    def extract_features(
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Any = None,
        incremental_state: Optional[dict[str, Any]] = None,
        memory: Optional[RowMemory] = None,
        group: Optional[distributed.ProcessGroup] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """As :meth:`forward` with ``features_only``."""
        if incremental_state is not None:
            return self._advance(prev_output_tokens, incremental_state), None
        prev_output_tokens = padding_as_words(prev_output_tokens, self.dictionary)
        state = None if memory is None else memory.recall(self.stack, prev_output_tokens)
        padding_mask = prev_output_tokens.eq(self.padding_idx)
        features, state = self.stack(prev_output_tokens, padding_mask, state, group=group)
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
        if log_probs and isinstance(net_output[0], LazyLogits):
            return net_output[0].normalized()
        return normalized_probs(net_output[0], log_probs)

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: torch.Tensor) -> None:
        """Picks the rows of the state for the beams that go on."""
        key = self._get_full_incremental_state_key("flash")
        if key not in incremental_state:
            return
        consumed, state = incremental_state[key]
        # Without beams the order stays: a look costs less than a copy, and fairseq waits for a device anyway.
        if torch.equal(new_order, torch.arange(state.position.shape[0], device=new_order.device)):
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
        if new.shape[1] > 1:
            new = padding_as_words(new, self.dictionary)
            features, state = self.stack(new, new.eq(self.padding_idx), state)
        elif self.step_graphs is None or self.step_graphs.objections(self.stack, new, state):
            features, state = self.stack(new, None, state)
        else:
            features, state = self.step_graphs(self.stack, new, state)
        incremental_state[key] = tokens.shape[1], state
        return features[:, -1:]


@register_model("flash_lm", dataclass=FlashLanguageModelConfig)
class FlashLanguageModel(RememberingModel, FairseqLanguageModel):
    """FLASH as a language model: trains in linear time, generates at constant cost per token.

    Source: Hua et al. 2022, section 4.
    """

    #: Of fairseq's, those that train it.
    allowed_criterions = NEXT_WORD
    #: Of fairseq's and ours, those whose target is the next word.
    allowed_tasks = frozenset(
        {"language_modeling", "flash_language_modeling", "multilingual_language_modeling", "flash_recall"}
    )

    @classmethod
    def build_model(cls, cfg: FlashLanguageModelConfig, task: Any) -> "FlashLanguageModel":
        """Builds the model for a task with a ``source_dictionary`` and a ``target_dictionary``.

        Raises:
            ValueError: an option has a value that is not allowed.
        """
        check_sizes(cfg)
        embed_tokens = build_input(cfg, task.source_dictionary)
        model = cls(FlashDecoder(cfg, task.target_dictionary, embed_tokens, resolve_n_ref(cfg, task)))
        model.remember(cfg, FlashLanguageModelConfig, task.target_dictionary)
        watch_layers(model, model.decoder.stack.blocks, cfg.diagnostics_interval)
        return model

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuses a checkpoint of another dictionary.

        Raises:
            ValueError: it has another size.
        """
        stored, words = state_dict.get("decoder.output_projection.weight"), len(self.decoder.dictionary)
        if stored is not None and len(stored) != words:
            raise ValueError(
                f"the dictionary has {words} words; allowed: {len(stored)}, those that the checkpoint was "
                "trained with"
            )
        super().upgrade_state_dict_named(state_dict, name)


def normalized_probs(logits: torch.Tensor, log_probs: bool) -> torch.Tensor:
    """Probabilities, or their logarithms, over the last axis, in float32 or wider."""
    function = torch.log_softmax if log_probs else torch.softmax
    return function(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


PRESETS = register("flash_lm", FlashLanguageModelConfig, LANGUAGE_MODELS)
