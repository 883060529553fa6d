"""Generation that reads its prompt at once, where fairseq's own generator feeds it token by token."""

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any, Optional

import torch
from fairseq.search import BeamSearch, Sampling
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator

from fairseq_flash.modules import DecodingState

__all__ = ["PromptPassGenerator"]

logger = logging.getLogger(__name__)

#: Log-probabilities held at a time while a prompt is read; its length does not enter the memory.
PIECE_NUMBERS = 2**25
#: Tokens of a prompt that are read at a time, at least.
LEAST_PIECE = 512


class PromptPassGenerator(SequenceGenerator):
    """fairseq's generator with a bulk prompt pass: the prompt costs what a forward pass costs.

    A prompt is read in a few parallel pieces that leave the models' states behind; the generator starts
    behind it. Hypotheses, scores and their order are those of the token-by-token generator up to rounding,
    except that sampling draws other random numbers, as the prompt uses up none.

    What cannot be the same takes fairseq's own way, and a line in the log says why: models without a state,
    options that look at or count the prompt's tokens, and rows with ``</s>`` within the prompt.

    Args:
        models: One, or an ensemble.
        args: As for fairseq's generator.
        kwargs: Likewise.
    """

    def __init__(self, models: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_PrimedEnsemble(models), *args, **kwargs)
        self._explained: set[str] = set()

    def _generate(
        self,
        sample: dict[str, Any],
        prefix_tokens: Optional[torch.Tensor] = None,
        constraints: Optional[torch.Tensor] = None,
        bos_token: Optional[int] = None,
    ) -> list[list[dict[str, torch.Tensor]]]:
        def one_by_one(
            sample: dict[str, Any], prefix_tokens: Optional[torch.Tensor]
        ) -> list[list[dict[str, torch.Tensor]]]:
            """Fairseq's own way."""
            return super(PromptPassGenerator, self)._generate(sample, prefix_tokens, constraints, bos_token)

        if prefix_tokens is None or not prefix_tokens.shape[1] or self._objects(constraints):
            return one_by_one(sample, prefix_tokens)
        width = sample["net_input"]["src_tokens"].shape[1]
        max_len = min(int(self.max_len_a * width + self.max_len_b), self.max_len - 1)
        groups = self._group(prefix_tokens, max_len)
        if None in groups:
            self._explain("a prompt has </s> within it, or is shorter than others and than --min-len")
        found = {}
        for length, rows in groups.items():
            part = _pick(sample, rows)
            if length is None:
                hypotheses = one_by_one(part, prefix_tokens[rows])
            else:
                bos = self.eos if bos_token is None else bos_token
                context = torch.nn.functional.pad(prefix_tokens[rows, :length], (1, 0), value=bos)
                min_len = max(0, self.min_len - prefix_tokens.shape[1])
                hypotheses = self._continue(part, context, min_len, max_len - length)
            found.update(zip(rows, hypotheses, strict=True))
        return [found[row] for row in range(len(found))]

    def _objects(self, constraints: Optional[torch.Tensor]) -> bool:
        objections = {
            "a model has no state of its own": not all(
                hasattr(getattr(model, "decoder", None), "continue_from") for model in self.model.models
            ),
            "--no-repeat-ngram-size looks at the prompt": self.repeat_ngram_blocker is not None,
            "the search counts the prompt's steps": type(self.search) not in (BeamSearch, Sampling),
            "--match-source-len counts the prompt's steps": self.match_source_len,
            "another language model is mixed in": self.lm_model is not None,
            "tokens are suppressed": self.token_indices_to_suppress is not None,
            "there are constraints": constraints is not None,
        }
        objection = next((reason for reason, applies in objections.items() if applies), None)
        if objection:
            self._explain(objection)
        return objection is not None

    def _explain(self, reason: str) -> None:
        if reason not in self._explained:
            logger.info(f"prompts are fed token by token, which is slower: {reason}")
            self._explained.add(reason)

    def _group(self, prefix_tokens: torch.Tensor, max_len: int) -> dict[Optional[int], list[int]]:
        """Rows by the length of their prompt; None for those that the generator must be fed one by one."""
        groups = defaultdict(list)
        width = prefix_tokens.shape[1]
        for row, tokens in enumerate(prefix_tokens.tolist()):
            length = width - tokens.count(self.pad)
            within = tokens[: min(length, max_len)]
            # fairseq's minimum length spares shorter rows until the longest prompt ends.
            uneven = length < width < self.min_len
            irregular = self.eos in within or self.pad in tokens[:length] or self.min_len > max_len
            groups[None if uneven or irregular else len(within)].append(row)
        return groups

    def _continue(
        self, sample: dict[str, Any], context: torch.Tensor, min_len: int, max_len: int
    ) -> list[list[dict[str, torch.Tensor]]]:
        """Hypotheses after ``context`` (b, m), which begins with the token that fairseq begins with."""
        states, scores = self._read(context)
        beams = torch.arange(len(context), device=context.device).repeat_interleave(self.beam_size)
        self.model.start_from([state.reorder(beams) for state in states])
        rest = copy.copy(self)
        rest.max_len_a, rest.max_len_b, rest.min_len = 0, max_len, min_len
        found = SequenceGenerator._generate(rest, sample, bos_token=context[beams, -1])
        return [
            sorted(
                (self._prepend(prompt, before, hypothesis) for hypothesis in hypotheses),
                key=lambda hypothesis: -float(hypothesis["score"]),
            )
            for prompt, before, hypotheses in zip(context[:, 1:], scores, found, strict=True)
        ]

    def _read(self, context: torch.Tensor) -> tuple[list[DecodingState], torch.Tensor]:
        """States before the last token of ``context`` (b, m), and scores (b, m - 1) of all but the first."""
        step = PIECE_NUMBERS // (len(context) * self.vocab_size)
        # Of whole chunks, which are read faster, as far as these divide it.
        step = max(LEAST_PIECE, step - step % LEAST_PIECE)
        states, of_models = [], []
        for model in self.model.models:
            scores = [context.new_zeros(len(context), 0, dtype=torch.float32)]
            use = partial(self._score, model, iter(context[:, 1:].split(step, dim=1)), scores)
            states.append(model.decoder.stack.read(context[:, :-1], piece=step, use=use))
            of_models.append(torch.cat(scores, dim=1))
        mean = torch.logsumexp(torch.stack(of_models), dim=0) - math.log(len(of_models))
        return states, mean - self.unk_penalty * context[:, 1:].eq(self.unk)

    def _score(
        self, model: Any, targets: Iterator[torch.Tensor], scores: list, features: torch.Tensor
    ) -> None:
        """Adds the scores of the next piece of ``targets`` (b, m), given ``features`` (b, m, d)."""
        logits = model.decoder.output_layer(features).div_(self.temperature)
        log_probs = model.get_normalized_probs((logits, None), log_probs=True, sample=None)
        scores.append(log_probs.gather(2, next(targets).unsqueeze(2)).squeeze(2))

    def _prepend(
        self, prompt: torch.Tensor, before: torch.Tensor, hypothesis: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        positional = torch.cat((before.to(hypothesis["positional_scores"]), hypothesis["positional_scores"]))
        score = positional.sum()
        if self.normalize_scores:
            score = score / len(positional) ** self.len_penalty
        tokens = torch.cat((prompt, hypothesis["tokens"]))
        return {**hypothesis, "tokens": tokens, "score": score, "positional_scores": positional}


class _PrimedEnsemble(EnsembleModel):
    """Models whose next generation starts from given states."""

    def __init__(self, models: Any) -> None:
        super().__init__(models)
        self._states: Optional[list[DecodingState]] = None

    def start_from(self, states: list[DecodingState]) -> None:
        self._states = states

    def forward_decoder(
        self, tokens: torch.Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> Any:
        if self._states is not None:
            for model, incremental, state in zip(self.models, incremental_states, self._states, strict=True):
                model.decoder.continue_from(incremental, state)
            self._states = None
        return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)


def _pick(sample: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch, as far as the generator looks at it."""
    tensors = ((name, sample["net_input"].get(name)) for name in ("src_tokens", "src_lengths"))
    picked = {name: tensor[rows] for name, tensor in tensors if tensor is not None}
    return {"net_input": picked, **({"id": sample["id"][rows]} if "id" in sample else {})}
