"""Layers as the options ask for them: the block, its compilation, then activation checkpointing."""

import functools
import importlib.util
import os
import shutil
from typing import Any, Optional

import torch
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import distributed, nn

from fairseq_flash.models._embedding import embed_scale
from fairseq_flash.models._option_checks import check_layers, check_sizes
from fairseq_flash.models._options import FlashConfig
from fairseq_flash.modules import (
    DecoderLayer,
    DecodingState,
    GatedAttentionUnit,
    GatedCrossAttention,
    Rows,
    Stack,
    TransformerBlock,
)
from fairseq_flash.modules.pass_graph import PassGraphs, is_watched

__all__ = [
    "build_stack",
    "compile_objections",
    "compiled_layers",
    "layers_in_a_graph",
    "resolve_n_ref",
    "whole_rows",
]

#: Graphs of the layers' code before PyTorch gives up: two stacks, four layers, the last ones and one, with
#: and without gradient and padding, batches of one row, rows of one token and rows below a chunk come to
#: fewer.
GRAPHS = 64


def build_stack(
    cfg: FlashConfig, embed_tokens: nn.Module, *, causal: bool, n_ref: int, reads_source: bool = False
) -> Stack:
    """The embedding, the layers and the final norm as the options ask for.

    Args:
        cfg: The options.
        embed_tokens: From tokens ``(b, n)`` to ``(b, n, d)``.
        causal: Whether a token sees only tokens before it; a Transformer layer is always causal.
        n_ref: Resolved length that causal quadratic scores of a gated attention unit are divided by.
        reads_source: Whether each layer attends to a source as well.

    Returns:
        The stack.

    Raises:
        ValueError: an option has a value that is not allowed, would have no effect, or ``--compile`` cannot
            run here.
    """
    check_sizes(cfg)
    check_layers(cfg)
    layers = []
    for _ in range(cfg.layers):
        layer = _build_block(cfg, causal, n_ref)
        if reads_source:
            layer = DecoderLayer(layer, _build_cross(cfg))
        layers.append(_wrapped(cfg, layer))
    stack = Stack(
        embed_tokens,
        layers,
        embed_dim=cfg.embed_dim,
        attention_dim=cfg.attention_dim,
        norm=str(cfg.norm),
        scaled_sin=cfg.scaled_sin,
        embed_scale=embed_scale(cfg),
        dropout=cfg.dropout,
    )
    if cfg.compile and not (cfg.checkpoint_activations or cfg.offload_activations):
        stack.through = functools.partial(_through, stack)
        # An adaptive input waits for the number of tokens of each kind.
        if isinstance(embed_tokens, nn.Embedding):
            stack.forward = functools.partial(_pass, stack, PassGraphs())
    return stack


def _build_block(cfg: FlashConfig, causal: bool, n_ref: int) -> nn.Module:
    options = dict(
        attention=str(cfg.attention),
        attention_dim=cfg.attention_dim,
        chunk_size=cfg.chunk_size,
        linear_norm=str(cfg.linear_norm),
        norm=str(cfg.norm),
        init=str(cfg.init),
        dropout=cfg.dropout,
        backend=str(cfg.backend),
    )
    if cfg.block == "transformer":
        options.update(ffn_embed_dim=cfg.ffn_embed_dim, glu=cfg.glu, attention_dropout=cfg.attention_dropout)
        return TransformerBlock(cfg.embed_dim, **options)
    relative_bias = None if cfg.relative_bias is None else str(cfg.relative_bias)
    options.update(expansion_factor=cfg.expansion_factor, relative_bias=relative_bias)
    options.update(shift_keys=cfg.shift_keys, adopt_n_ref=cfg.n_ref is None)
    unit = GatedAttentionUnit(cfg.embed_dim, causal=causal, n_ref=n_ref, **options)
    unit.check_backend_on("cuda" if torch.cuda.is_available() else "cpu")
    return unit


def _build_cross(cfg: FlashConfig) -> GatedCrossAttention:
    return GatedCrossAttention(
        cfg.embed_dim,
        expansion_factor=cfg.expansion_factor,
        attention_dim=cfg.attention_dim,
        norm=str(cfg.norm),
        init=str(cfg.init),
        dropout=cfg.dropout,
        backend=str(cfg.backend),
    )


def _wrapped(cfg: FlashConfig, layer: nn.Module) -> nn.Module:
    """The same layer, whose parameters keep their names, with another ``forward``."""
    if cfg.compile:
        objections = compile_objections()
        if objections:
            raise ValueError(f"--compile cannot run: {'; '.join(objections)}; allowed: without --compile")
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        # As a partial, a deep copy such as EMA's is bound to the copied layer.
        layer.forward = functools.partial(_forward, layer)
    if cfg.checkpoint_activations or cfg.offload_activations:
        # Around the compiled layer: fairseq's checkpointing is no part of a graph.
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return layer


def compile_objections() -> list[str]:
    """Why ``--compile`` cannot run on this machine; nothing if it can."""
    found = []
    if not torch._dynamo.is_dynamo_supported():
        found.append(f"torch {torch.__version__} does not compile on this Python or system")
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            found.append("Triton, which compiles for a GPU, is not installed")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        found.append(f"there is no C++ compiler {os.environ.get('CXX', 'g++')} (CXX names another)")
    return found


def _forward(
    layer: nn.Module,
    x: torch.Tensor,
    padding_mask: Optional[torch.Tensor] = None,
    state: Any = None,
    *,
    rows: Optional[Rows] = None,
    **source: Optional[torch.Tensor],
) -> tuple[torch.Tensor, Any]:
    """A layer on whole rows through its compiled code, which all layers of its kind share."""
    if state is not None or rows is None or is_watched(layer):
        return type(layer).forward(layer, x, padding_mask, state, rows=rows, **source)
    return _compiled([layer], x, rows, source), None


def _pass(
    stack: Stack,
    graphs: PassGraphs,
    tokens: torch.Tensor,
    padding_mask: Optional[torch.Tensor] = None,
    state: Optional[DecodingState] = None,
    *,
    group: Optional[distributed.ProcessGroup] = None,
    **source: Optional[torch.Tensor],
) -> tuple[torch.Tensor, Optional[DecodingState]]:
    """A stack; on a GPU its kernels are recorded where batches of a shape come again and again."""
    graphs.give_back(tokens.device)
    if state is not None or group is not None or graphs.objections(stack, tokens):
        return type(stack).forward(stack, tokens, padding_mask, state, group=group, **source)
    run = functools.partial(_features, stack, tuple(source))
    return graphs(stack, run, (tokens, padding_mask, *source.values())), None


def _features(stack: Stack, names: tuple[str, ...], *tensors: Optional[torch.Tensor]) -> torch.Tensor:
    """Of tokens, their mask and the source's tensors of these names, without a state."""
    tokens, padding_mask, *given = tensors
    return type(stack).forward(stack, tokens, padding_mask, **dict(zip(names, given, strict=True)))[0]


def _through(
    stack: Stack,
    x: torch.Tensor,
    state: Optional[DecodingState],
    rows: Rows,
    source: dict[str, Optional[torch.Tensor]],
) -> tuple[torch.Tensor, Optional[DecodingState]]:
    """All layers, several in a graph; one by one where somebody has put something in between."""
    blocks = list(stack.blocks)
    size = layers_in_a_graph(x.device.type, len(blocks))
    if state is not None or size == 1 or any(_changed(block) or is_watched(block) for block in blocks):
        return type(stack).through(stack, x, state, rows, source)
    for first in range(0, len(blocks), size):
        x = _compiled(blocks[first : first + size], x, rows, source)
    return x, None


def layers_in_a_graph(device: str, layers: int) -> int:
    """Up to 4 on a GPU, 1 on a CPU.

    From graph to graph the host takes longer than a GPU for a small layer, and more layers in a graph take
    longer to compile, a last one of fewer layers as well: so graphs, and layers that are compiled, are
    together as few as can be.

    Args:
        device: Its type.
        layers: How many there are.

    Returns:
        Layers of each graph but the last.
    """
    sizes = range(1, 2 if device == "cpu" else 5)
    return min(sizes, key=lambda size: (size + layers % size + -(-layers // size), -size))


def _changed(block: nn.Module) -> bool:
    """Whether its ``forward`` is no longer what was built here."""
    return getattr(block.forward, "func", None) is not _forward


def _compiled(
    layers: list[nn.Module], x: torch.Tensor, rows: Rows, source: dict[str, Optional[torch.Tensor]]
) -> torch.Tensor:
    if rows.group is not None:
        raise ValueError("group is given to a compiled layer; allowed: without --compile")
    _mark_dynamic(x, 0, 1)
    for tensor, axes in (
        (rows.padding_mask, (0, 1)),
        (rows.lengths, (0,)),
        (rows.positions, (0,)),
        (rows.cos, (0,)),
        (rows.sin, (0,)),
        *((tensor, (0, 1)) for tensor in source.values()),
    ):
        if tensor is not None:
            _mark_dynamic(tensor, *axes)
    # What no layer needs would be guarded on, and compiled anew.
    return compiled_layers()(layers, x, rows._replace(given_mask=None, shift=None), source)


def _mark_dynamic(tensor: torch.Tensor, *axes: int) -> None:
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)


@functools.cache
def compiled_layers() -> Any:
    """:func:`whole_rows` for this machine."""
    return torch.compile(whole_rows, fullgraph=True)


def whole_rows(
    layers: list[nn.Module], x: torch.Tensor, rows: Rows, source: dict[str, Optional[torch.Tensor]]
) -> torch.Tensor:
    """Layers on aligned rows, without a state: what is one graph, shared by all layers of a kind."""
    for layer in layers:
        x, _ = type(layer).forward(layer, x, rows=rows, **source)
    return x


def resolve_n_ref(cfg: Any, task: Any) -> int:
    """The length that causal quadratic scores are divided by, where no checkpoint says it.

    Args:
        cfg: The options of the model.
        task: Whose rows' length counts if ``--n-ref`` is not given.

    Returns:
        The length.

    Raises:
        ValueError: it is below 1.
    """
    options = getattr(task, "cfg", None) or getattr(task, "args", None)
    names = ("tokens_per_sample", "max_positions", "max_target_positions")
    candidates = {"n_ref": cfg.n_ref, **{name: getattr(options, name, None) for name in names}}
    name, length = next(((name, n) for name, n in candidates.items() if isinstance(n, int)), ("", 1024))
    if length < 1:
        less = ", --context-window taken away," if name == "tokens_per_sample" else ""
        raise ValueError(f"--{name.replace('_', '-')} {length}{less} is not allowed; allowed: 1 or more")
    return length
