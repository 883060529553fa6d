"""Prints how an architecture starts: whether every branch counts and every parameter learns.

    python scripts/health.py --arch flash_lm_tiny [any option of the model]

For each layer: the size of its branches against the residual and of its linear against its quadratic branch.
For each group of parameters: the size of its gradient against the median group's, after one backward pass on
random tokens (Zipf's law), of which an encoder has to find the masked ones, and an encoder-decoder has to
translate one row into another. Outside the band, a warning; the exit status stays 0, as the paper's own start
is outside.
"""

import copy
import dataclasses
import statistics
import sys
from typing import Any, NamedTuple

import torch
from fairseq.models import FairseqEncoderDecoderModel
from torch import nn

from bench.models import build
from fairseq_flash.modules import GatedAttentionUnit, GatedCrossAttention, Stack, TransformerBlock
from runs.command_line import command_line, require

#: Lowest and highest ratio of a healthy start.
BANDS = {"branch/residual": (0.01, 1.0), "linear/quadratic": (0.1, 10.0), "gradient/median": (1e-3, 1e3)}

#: Part of the tokens that an encoder has to find, as in fairseq's masked_lm.
MASKED = 0.15


class Measurement(NamedTuple):
    """One ratio: what it is, where it was taken, and its value."""

    ratio: str
    place: str
    value: float

    @property
    def healthy(self) -> bool:
        """Whether the value lies in the ratio's band."""
        lowest, highest = BANDS[self.ratio]
        return lowest <= self.value <= highest


def measure(model: nn.Module, tokens: torch.Tensor) -> list[Measurement]:
    """Measures a model as it stands, without dropout.

    Args:
        model: With a ``Stack`` at ``model.decoder.stack``, to predict the next token, or at
            ``model.encoder.stack``, to predict masked ones; called as ``model(tokens)``, or with both.
        tokens: ``(b, n)``, several chunks long.

    Returns:
        The ratios, layer by layer, then group by group.
    """
    model.eval()
    if isinstance(model, FairseqEncoderDecoderModel):
        previous, targets = tokens.flip(0)[:, :-1], tokens.flip(0)[:, 1:].flatten()
        source, _ = model.encoder.stack(tokens)
        found = layer_ratios(model.encoder.stack, tokens)
        found += layer_ratios(model.decoder.stack, previous, source=source)
        logits = model(tokens, None, previous)[0].flatten(0, 1)
    elif hasattr(model, "encoder"):
        found = layer_ratios(model.encoder.stack, tokens)
        masked = torch.rand(tokens.shape) < MASKED
        mask = model.encoder.dictionary.index("<mask>")
        logits, _ = model(tokens.masked_fill(masked, mask), masked_tokens=masked)
        targets = tokens[masked]
    else:
        found = layer_ratios(model.decoder.stack, tokens)
        logits, _ = model(tokens[:, :-1])
        logits, targets = logits.flatten(0, 1), tokens[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits, targets)
    model.zero_grad()
    loss.backward()
    return found + gradient_ratios(model)


@torch.no_grad()
def layer_ratios(stack: Stack, tokens: torch.Tensor, **source: torch.Tensor) -> list[Measurement]:
    """The sizes of each layer's branches; of the linear one beyond the first chunk, which it cannot see.

    Args:
        stack: Of any layers.
        tokens: ``(b, n)``, several chunks long.
        source: What layers of a decoder take beside the row.
    """
    found, seen = [], {}

    def note(block: nn.Module, args: tuple, out: Any) -> None:
        """Keeps what goes in and what comes out."""
        seen[block] = args[0], out[0] if isinstance(out, tuple) else out

    kinds = (GatedAttentionUnit, GatedCrossAttention, TransformerBlock)
    blocks = {block: name for name, block in stack.named_modules() if isinstance(block, kinds)}
    hooks = [block.register_forward_hook(note) for block in blocks]
    stack(tokens, **source)
    for hook in hooks:
        hook.remove()
    for block, name in blocks.items():
        x, y = seen[block]
        place = f"layer {name.removeprefix('blocks.').replace('.', ', ')}"
        if isinstance(block, GatedCrossAttention):
            found.append(Measurement("branch/residual", place, rms(y - x) / rms(x)))
            continue
        branch = attended(block, x)
        found.append(Measurement("branch/residual", place, rms(branch) / rms(x)))
        if isinstance(block, TransformerBlock):
            x = x + branch
            found.append(Measurement("branch/residual", f"{place}, feed-forward", rms(y - x) / rms(x)))
        if block.attention == "mixed_chunk":
            quadratic, linear = (attended(only(block, branch), seen[block][0]) for branch in block.branches)
            c = block.chunk_size
            ratio = rms(linear[:, c:]) / rms(quadratic[:, c:])
            found.append(Measurement("linear/quadratic", place, ratio))
    return found


def attended(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the attention of a layer adds to its input ``x`` (b, n, d)."""
    seen = []
    hook = block.out.register_forward_hook(lambda layer, args, out: seen.append(out))
    block(x)
    hook.remove()
    return seen[0]


def only(block: nn.Module, branch: str) -> nn.Module:
    """A copy of a mixed chunk layer with one branch alone, "quad" or "lin"."""
    alone = copy.deepcopy(block)
    alone.branches = (branch,)
    options = block.attend.options._replace(branches=alone.branches)
    alone.attend = dataclasses.replace(block.attend, options=options)
    if isinstance(block, GatedAttentionUnit):
        begin = 2 * block.branches.index(branch)
        for name, copies in block.offset_scale.named_parameters():
            setattr(alone.offset_scale, name, nn.Parameter(copies[begin : begin + 2]))
    return alone


def gradient_ratios(model: nn.Module) -> list[Measurement]:
    """The root mean square gradient of each group of parameters against the median group's.

    A group is one kind of parameter over all layers, each pair of gammas on its own; the positions' one
    number, whose gradient is a sum over the whole batch, counts with the embeddings.
    """
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        name = name.removeprefix("decoder.").removeprefix("encoder.").removeprefix("stack.")
        if name.startswith("blocks."):
            name = name.split(".", 2)[2]
        if name.endswith("offset_scale.gamma"):
            for kind, part in zip(("first", "second"), parameter.grad.split(2), strict=False):
                groups.setdefault(f"{name} ({kind} branch)", []).append(part)
        else:
            groups.setdefault("embeddings" if name.startswith("embed") else name, []).append(parameter.grad)
    sizes = {name: rms(torch.cat([grad.flatten() for grad in grads])) for name, grads in groups.items()}
    median = statistics.median(sizes.values())
    return [Measurement("gradient/median", name, value / median) for name, value in sizes.items()]


def rms(x: torch.Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


def zipf_tokens(vocabulary: int, b: int, n: int, first: int = 4) -> torch.Tensor:
    """Random tokens (b, n) from ``first`` on, the k-th with probability proportional to 1/k."""
    weights = 1 / torch.arange(1, vocabulary - first + 1)
    return torch.multinomial(weights, b * n, replacement=True).view(b, n) + first


def main() -> None:
    """Runs the command line."""
    parser = command_line(__doc__, "health.py")
    parser.add_argument("--vocabulary", type=int, default=4000, help="words of the dictionary")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row, of two rows")
    parser.add_argument("--seed", type=int, default=1)
    own, model_options = parser.parse_known_args()
    require(parser, own, 5, "vocabulary")
    require(parser, own, 1, "length")
    if not any(word.partition("=")[0] in ("--arch", "-a") for word in model_options):
        parser.error("--arch is missing; allowed: an architecture of this package, such as flash_lm_tiny")
    torch.manual_seed(own.seed)
    model = build(model_options, own.vocabulary)
    found = measure(model, zipf_tokens(own.vocabulary, 2, own.length))
    for ratio, place, value in found:
        lowest, highest = BANDS[ratio]
        band = f"{lowest:g} to {highest:g}"
        said = f"   in {band}" if lowest <= value <= highest else f"   WARNING: outside {band}"
        print(f"{ratio:18} {place:36} {value:10.2e}{said}")
    outside = sum(not measurement.healthy for measurement in found)
    print(f"{len(found) - outside} of {len(found)} in the band", file=sys.stderr)


if __name__ == "__main__":
    main()
