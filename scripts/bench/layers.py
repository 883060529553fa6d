"""The layers that benchmark_ops.py times: FLASH in every implementation, and what it is compared with.

A contender stands for one Transformer layer: two gated attention units, or an attention with a feed-forward
network. All have random weights and no dropout.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import NamedTuple, Optional

import torch
from torch import nn

from fairseq_flash.modules import GatedAttentionUnit, TransformerBlock, align_rows
from fairseq_flash.modules.layer import Layer
from fairseq_flash.ops import BACKENDS

__all__ = ["CONTENDERS", "Contender", "Layers", "build", "multiply_adds", "refuse_unequal"]

#: Of the float32 result, for a result in bfloat16; measured: 6e-3.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
#: Tokens of the check: several chunks, and none a whole one.
CHECKED = 1000


class Layers(nn.Module):
    """Layers one after the other; ours share the angles of their positions, as in a stack.

    Args:
        layers: From ``(b, n, d)`` to ``(b, n, d)``, or to a tuple that begins with it.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes ``(b, n, d)``, gives ``(b, n, d)``."""
        rows = None
        for layer in self.layers:
            if isinstance(layer, Layer) and rows is None:
                _, rows = align_rows(x, None, None, layer.attention_dim, x.dtype)
            out = layer(x) if rows is None else layer(x, rows=rows)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Contender(NamedTuple):
    """What takes turns.

    Attributes:
        name: As records name it.
        make: From ``d`` and ``chunk_size`` to the layers.
        needs: A package that must be installed; None for none.
        gpu: Whether it runs on a GPU alone.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    needs: Optional[str] = None
    gpu: bool = False


def _units(backend: str, attention: str = "mixed_chunk") -> Callable[[int, int], nn.Module]:
    def make(d: int, c: int) -> nn.Module:
        return Layers(
            GatedAttentionUnit(d, attention=attention, chunk_size=c, backend=backend) for _ in range(2)
        )

    return make


def _transformer(d: int, c: int) -> nn.Module:
    return Layers([TransformerBlock(d, attention="quadratic", glu=True)])


def _mixed_transformer(d: int, c: int) -> nn.Module:
    return Layers([TransformerBlock(d, attention="mixed_chunk", glu=True, chunk_size=c)])


def _peer(d: int, c: int) -> nn.Module:
    from flash_pytorch import FLASH

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(d)
            self.unit = FLASH(dim=d, group_size=c, causal=True, query_key_dim=128, dropout=0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.unit(self.norm(x))

    return Layers([Unit(), Unit()])


def _fla(layer: str) -> Callable[[int, int], nn.Module]:
    """A layer of flash-linear-attention with a gated feed-forward network, as its own models have it."""

    def make(d: int, c: int) -> nn.Module:
        from fla import layers

        options = {"GatedLinearAttention": dict(num_heads=max(1, d // 256))}.get(
            layer, dict(head_dim=128, num_heads=max(1, d // 256))
        )

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
                self.attention = getattr(layers, layer)(hidden_size=d, **options)
                width = 8 * -(-d // 3)
                self.ffn_in, self.ffn_out = nn.Linear(d, 2 * width), nn.Linear(width, d)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = x + self.attention(self.norm(x))[0]
                gate, value = self.ffn_in(self.ffn_norm(x)).chunk(2, dim=-1)
                return x + self.ffn_out(nn.functional.silu(gate) * value)

        return Layers([Block()])

    return make


#: By name; a new implementation of the op is a contender without a line here.
CONTENDERS = {
    contender.name: contender
    for contender in (
        *(Contender(f"flash/{name}", _units(name)) for name in BACKENDS if name != "auto"),
        Contender("flash_local/auto", _units("auto", "local")),
        Contender("transformer_pp", _transformer),
        Contender("mc_transformer_pp", _mixed_transformer),
        Contender("FLASH-pytorch", _peer, needs="flash_pytorch"),
        Contender("fla GLA", _fla("GatedLinearAttention"), needs="fla", gpu=True),
        Contender("fla GatedDeltaNet", _fla("GatedDeltaNet"), needs="fla", gpu=True),
    )
}


def build(name: str, d: int, c: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A contender's layers, checked: against float32 where it can be had, and that a prefix stands alone.

    Args:
        name: Of ``CONTENDERS``.
        d: Model dimension.
        c: Chunk size, of those that have chunks.
        device: Where they run.
        dtype: Of the weights.

    Returns:
        The layers, in training.

    Raises:
        ValueError: it cannot run here.
        RuntimeError: its result is not that of the same weights in float32, or depends on what comes later.
    """
    contender = CONTENDERS[name]
    if contender.needs and importlib.util.find_spec(contender.needs) is None:
        raise ValueError(f"--systems {name} needs the package {contender.needs}, which is not installed")
    if contender.gpu and not device.startswith("cuda"):
        raise ValueError(f"--systems {name} runs on GPUs alone, not on {device}")
    torch.manual_seed(1)
    layers = contender.make(d, c).to(device, dtype)
    x = torch.randn(2, CHECKED, d, device=device).to(dtype)
    with torch.no_grad():
        found, prefix = layers(x), layers(x[:, : CHECKED // 2].contiguous())
        refuse_unequal(f"{name}, of a prefix,", found[:, : CHECKED // 2], prefix)
        if contender.needs is None:
            torch.manual_seed(1)
            wide = CONTENDERS[name.replace("triton", "reference")].make(d, c).to(device)
            wide.load_state_dict(layers.state_dict())
            refuse_unequal(name, found, wide(x.float()))
    return layers


def refuse_unequal(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuses a result that is not, within its dtype's rounding, what it should be.

    Raises:
        RuntimeError: it is not.
    """
    worst = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not worst <= TOLERANCE[found.dtype]:
        raise RuntimeError(f"{name} is wrong by {float(worst):.1e} of the largest number in {found.dtype}")


def multiply_adds(name: str, d: int, n: int, c: int, s: int = 128) -> int:
    """Multiply-adds of a token in a forward pass, in products; quadratic attention by its causal half.

    Returns:
        0 where it is not known.
    """
    e = 2 * d
    projections = d * (2 * e + s) + e * d
    if name.startswith("flash/"):
        return 2 * (projections + c * (s + e) // 2 + 2 * s * e)
    if name.startswith("flash_local/"):
        return 2 * (projections + c * (s + e) // 2)
    if name == "transformer_pp":
        return 4 * d * d + 3 * d * 8 * -(-d // 3) + n * d
    return 0
