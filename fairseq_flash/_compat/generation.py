"""Generation and evaluation: options that fail for some models or are ignored, and text not meant."""

import logging
import re
from collections.abc import Callable
from typing import Any, Optional

import torch

from fairseq_flash._compat.healing import check_first, wrap, wrap_in_tool
from fairseq_flash._compat.values import refuse, refuse_values

__all__ = ["prepare"]

logger = logging.getLogger(__name__)


def prepare() -> None:
    """Applies every healing of this file."""
    _accept_blank_prompts()
    _tell_of_prompts_without_room()
    _diversify_every_batch()
    _refuse_constraints_by_name()
    _refuse_what_generation_ignores()
    _refuse_an_empty_evaluation()
    _join_byte_pieces()


def _accept_blank_prompts() -> None:
    """Lets a language model continue a blank line; fairseq 0.12 fails with ``assert step < max_len``.

    With ``--prefix-size`` the prefix of a blank line is the end of the sentence, forced as the first token:
    one hypothesis of the beam ends there, the others score minus infinity and never end. An empty prompt
    forces nothing.
    """
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal(step: Callable) -> Callable:
        def healed(
            self: Any,
            generator: Any,
            models: Any,
            sample: Any,
            prefix_tokens: Optional[torch.Tensor] = None,
            constraints: Any = None,
        ) -> Any:
            if prefix_tokens is not None and prefix_tokens.size(1) > 0:
                blank = prefix_tokens[:, :1].eq(self.source_dictionary.eos())
                prefix_tokens = prefix_tokens.masked_fill(blank, self.source_dictionary.pad())
            return step(self, generator, models, sample, prefix_tokens, constraints)

        return healed

    wrap(LanguageModelingTask, "inference_step", heal)


def _tell_of_prompts_without_room() -> None:
    """Warns where a forced beginning is as long as all that may be generated; any version.

    fairseq gives its first tokens back as if they had been generated.
    """
    from fairseq.sequence_generator import SequenceGenerator

    def heal(generate: Callable) -> Callable:
        def healed(self, models: Any, sample: Any, **kwargs: Any) -> Any:
            prefix, tokens = kwargs.get("prefix_tokens"), sample["net_input"].get("src_tokens")
            if prefix is not None and tokens is not None and not self.match_source_len:
                width = tokens.shape[1]
                most = min(int(self.max_len_a * width + self.max_len_b), self.max_len - 1)
                full = int(prefix.ne(self.pad).sum(dim=1).ge(most).sum())
                if full:
                    logger.warning(
                        f"{full} of {len(prefix)} prompts {'has' if full == 1 else 'have'} {most} tokens or "
                        f"more, all that --max-len-b {self.max_len_b:g} and the model allow: nothing follows"
                    )
            return generate(self, models, sample, **kwargs)

        return healed

    wrap(SequenceGenerator, "generate", heal)


def _diversify_every_batch() -> None:
    """Lets ``--diverse-beam-groups`` see more than one batch; fairseq 0.12 fails with an IndexError.

    The overlap of its groups is kept by place in the batch, and looked up by the sentence's number in the
    data.
    """
    from fairseq.search import DiverseBeamSearch

    def heal(step: Callable) -> Callable:
        def healed(
            self: Any,
            number: int,
            lprobs: torch.Tensor,
            scores: torch.Tensor,
            prev_output_tokens: Optional[torch.Tensor] = None,
            original_batch_idxs: Optional[torch.Tensor] = None,
        ) -> Any:
            if number == 0:
                self._numbers = original_batch_idxs
            if original_batch_idxs is not None:
                # Sentences that have ended are gone; the others keep their order.
                original_batch_idxs = torch.isin(self._numbers, original_batch_idxs).nonzero().squeeze(1)
            return step(self, number, lprobs, scores, prev_output_tokens, original_batch_idxs)

        return healed

    wrap(DiverseBeamSearch, "step", heal)


def _refuse_constraints_by_name() -> None:
    """Says where ``--constraints`` cannot be used: fairseq 0.12 fails with a TypeError without its name."""
    from fairseq.search import LexicallyConstrainedBeamSearch
    from fairseq.tasks import FairseqTask
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal_build(build: Callable) -> Callable:
        def healed(self, models: Any, args: Any, *others: Any, **kwargs: Any) -> Any:
            if isinstance(self, LanguageModelingTask) and getattr(args, "constraints", None):
                raise ValueError(
                    f"--constraints {args.constraints} is not allowed with a language model; allowed: with "
                    "fairseq-interactive and --task translation"
                )
            return build(self, models, args, *others, **kwargs)

        return healed

    def heal_init(init: Callable) -> Callable:
        def healed(self, batch_constraints: Any, beam_size: int) -> None:
            if batch_constraints is None:
                raise ValueError(
                    "--constraints is not allowed with fairseq-generate, whose data have none; allowed: with "
                    "fairseq-interactive, where they follow each sentence"
                )
            init(self, batch_constraints, beam_size)

        return healed

    wrap(FairseqTask, "build_generator", heal_build)
    wrap(LexicallyConstrainedBeamSearch, "init_constraints", heal_init)


#: What only models that write a sentence again and again take; others would ignore it.
_ITERATIVE = {
    **{"print_step": False, "retain_iter_history": False, "iter_decode_force_max_iter": False},
    **{"iter_decode_max_iter": 10, "iter_decode_eos_penalty": 0.0, "iter_decode_with_beam": 1},
    "iter_decode_with_external_reranker": False,
}


def _refuse_what_generation_ignores() -> None:
    """Says which options of generation cannot be; fairseq 0.12 ignores some, and fails late with others.

    Where there are no steps to be printed it is a KeyError after a batch; top-k of 0 and top-p beyond 1 are
    taken as if they were not given, and so are both without ``--sampling``.
    """
    from fairseq.tasks import FairseqTask

    def heal(build: Callable) -> Callable:
        def healed(self, models: Any, args: Any, *others: Any, **kwargs: Any) -> Any:
            problem = "is not allowed; allowed: with --task translation_lev, as others write each word once"
            given = ((name, getattr(args, name, default), default) for name, default in _ITERATIVE.items())
            refuse((name, value, problem) for name, value, default in given if value != default)
            refuse_values("generation", args)
            return build(self, models, args, *others, **kwargs)

        return healed

    wrap(FairseqTask, "build_generator", heal)


def _refuse_an_empty_evaluation() -> None:
    """Says that no token was evaluated; fairseq 0.12 reports a perplexity of 1, with status 0.

    A shard may have none, where there are more shards than batches; the others tell.
    """
    shards = 1

    def heal_evaluation(evaluate: Callable) -> Callable:
        def healed(models: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = evaluate(models, *args, **kwargs)
            # Of no token the loss is Python's 0; one of 0 is a tensor's.
            if not isinstance(found["loss"], torch.Tensor) and found["loss"] == 0:
                if shards == 1:
                    raise ValueError("no token was evaluated; allowed: a split with words")
                logger.warning(f"no token was evaluated: this one of {shards} shards has none")
            return found

        return healed

    def prepare_evaluation(cfg: Any) -> None:
        nonlocal shards
        shards = getattr(getattr(cfg, "dataset", None), "num_shards", 1)
        wrap_in_tool("eval_lm", "eval_lm", heal_evaluation)

    check_first(prepare_evaluation)


def _join_byte_pieces() -> None:
    """Shows characters that sentencepiece wrote as bytes, ``<0xC3> <0xA9>``, as the characters they are.

    Wherever fairseq turns pieces into text: ``--bpe sentencepiece`` and ``--remove-bpe sentencepiece``.
    """
    from fairseq.data import data_utils
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

    def healed_decode(decode: Callable) -> Callable:
        return lambda self, pieces: decode(self, _without_byte_pieces(pieces))

    def healed_post_process(post_process: Callable) -> Callable:
        def healed(sentence: str, symbol: str) -> str:
            if symbol == "sentencepiece":
                sentence = _without_byte_pieces(sentence)
            return post_process(sentence, symbol)

        return healed

    wrap(SentencepieceBPE, "decode", healed_decode)
    wrap(data_utils, "post_process", healed_post_process)


def _without_byte_pieces(pieces: str) -> str:
    def joined(found: re.Match) -> str:
        # Only a whole piece is a byte: a text's own "<0x41>" is split into others.
        return bytes.fromhex(re.sub(r"<0x|>| ", "", found[0])).decode(errors="replace")

    return re.sub(r"(?<![^ ])<0x[0-9A-F]{2}>(?: <0x[0-9A-F]{2}>)*(?![^ ])", joined, pieces)
