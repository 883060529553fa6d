"""FLASH for transformers, in one file: causal models, with a state of constant size, and masked models.

A model is a stack of gated attention units, y = x + (u * attention(q, k, v)) W, in which u, v and z come
from one dense layer of x and all queries and keys are scaled, shifted and rotated copies of z. Attention cuts
a row in chunks of c tokens and adds up two branches:

    quadratic   relu(q k^T / c + bias)^2 v        inside the chunk
    linear      q (sum of k^T v) / tokens summed  over strictly earlier chunks (causal), or all of them

If the mean is fading, earlier chunks weigh less and less, each group of the columns of v at another pace. If
keys are shifted, every second rotated pair of their columns is made of the z of the token before.

So a causal layer remembers one matrix, the sum, and the keys and values of the open chunk: never the past.

Letters in shapes: b rows, n tokens, g chunks of c tokens (i queries, j keys), s width of queries and keys, e
of values, d of the model. Source: Hua, Dai, Liu and Le, Transformer Quality in Linear Time, ICML 2022.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

BRANCHES = {"mixed_chunk": ("quad", "lin"), "quadratic": ("quad",), "local": ("quad",), "global": ("lin",)}
#: What an output calls the cache; newer versions of transformers have another name for it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
#: Position of padding among the keys of quadratic attention: behind every token.
NEVER = 2**62


class FlashConfig(PretrainedConfig):
    """Sizes and kinds; names and values as in fairseq_flash, where they differ from those of transformers."""

    model_type = "fairseq_flash"
    DEFAULTS = dict(  # noqa: RUF012
        vocab_size=32000,
        hidden_size=512,  # d
        expansion_factor=2,  # e = expansion_factor * d
        attention_dim=128,  # s
        num_hidden_layers=12,
        attention="mixed_chunk",  # or quadratic (no chunks), local, global (one branch)
        chunk_size=256,  # c
        linear_norm="mean",  # divides the linear branch by the tokens summed, "chunk": by c, or "fading"
        shift_keys=False,  # half of the columns of the keys are of the token before
        norm="layernorm",  # or scalenorm, rmsnorm
        relative_bias="rotary",  # or toeplitz, a table
        scaled_sin=False,  # absolute positions are added to the embedding
        n_ref=None,  # what causal quadratic scores are divided by, and where their table ends
        causal=True,
        dropout=0.0,
        use_cache=True,
    )

    def __init__(self, **options: Any) -> None:
        for name, default in self.DEFAULTS.items():
            setattr(self, name, options.pop(name, default))
        options.setdefault("is_decoder", self.causal)
        super().__init__(**options)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: all of it, as a file that leaves out defaults cannot be read without this code."""
        return {**super().to_diff_dict(), **{name: getattr(self, name) for name in self.DEFAULTS}}


class FlashCache(Cache):
    """What a causal model remembers: of each layer a few tensors ``(b, ...)``, which do not grow.

    (But for quadratic attention, which remembers every key and value.)
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[dict[str, torch.Tensor]] = [{} for _ in range(layers)]
        self.position: Optional[torch.Tensor] = None  # real tokens so far, (b,)
        self.columns = 0  # tokens so far, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Picks the rows of the beams that go on."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Picks rows."""
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *lengths: int) -> None:
        """Cannot be: what was summed cannot be taken away."""
        raise ValueError("the state of a FLASH model cannot go back; allowed: a copy made before")

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = [{name: function(x) for name, x in state.items()} for state in self.states]
        self.position = None if self.position is None else function(self.position)


class Rows(NamedTuple):
    """Where the real tokens of a batch lie, the same for all layers; padding may stand anywhere."""

    real: torch.Tensor  # (b, n), False at padding
    start: torch.Tensor  # (b,), real tokens of each row before this piece
    positions: torch.Tensor  # (b, n), index of each token among the real ones of its row
    cos: torch.Tensor  # (b, n, s / 2)
    sin: torch.Tensor
    step: bool  # whether every row goes on by one real token
    keep: bool  # whether a state is wanted

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of the piece, (b,)."""
        return self.real.sum(1)

    @property
    def latest(self) -> torch.Tensor:
        """The last real token up to each, counted from 1; 0 for one of before the piece: (b, n)."""
        columns = torch.arange(1, self.real.shape[1] + 1, device=self.real.device)
        return torch.where(self.real, columns, 0).cummax(dim=1).values


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64: for sums and positions."""
    return torch.promote_types(dtype, torch.float32)


def angles(positions: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position * 10000^(-i / (dim / 2)), exact at any position: each (..., dim / 2)."""
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(dim // 2, device=positions.device, dtype=exact) / (dim // 2)
    turned = positions.to(exact).unsqueeze(-1) * 10000.0**-exponents
    return turned.cos().to(dtype), turned.sin().to(dtype)


@functools.lru_cache(maxsize=8)
def waves(length: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Cosines, then sines, at distances 1 - length to length - 1: (2 length - 1, dim)."""
    return torch.cat(angles(torch.arange(1 - length, length, device=device), dim, dtype), dim=-1)


def kept_shares(e: int, device: torch.device) -> torch.Tensor:
    """Of a fading mean, what share of its weight a chunk keeps when another one has passed: (e,) by column.

    Columns are in groups: half-lives grow evenly in scale from 1 chunk to 16.
    """
    exact, groups = torch.float32 if device.type == "mps" else torch.float64, math.gcd(16, e)
    scale = torch.linspace(0, 1, groups, dtype=exact, device=device)
    return (0.5 ** (1 / 16**scale)).repeat_interleave(e // groups)


class RotaryBias(nn.Module):
    """b(t) = rope(a)_t . rope(b)_0: no table, any length."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, length: int) -> torch.Tensor:
        """The bias at distances 1 - length to length - 1, query minus key: (2 length - 1,)."""
        dtype = wide(self.a.dtype)
        (a1, a2), (b1, b2) = self.a.to(dtype).chunk(2), self.b.to(dtype).chunk(2)
        heights = torch.cat((a1 * b1 + a2 * b2, a1 * b2 - a2 * b1))
        return waves(length, len(self.a), dtype, self.a.device) @ heights


class ToeplitzBias(nn.Module):
    """A learned number for each distance below ``limit``."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.table = limit, nn.Parameter(torch.zeros(2 * limit - 1))

    def forward(self, length: int) -> torch.Tensor:
        """As :meth:`RotaryBias.forward`; only padding lies beyond the table."""
        distances = torch.arange(1 - length, length, device=self.table.device)
        return self.table[distances.clamp(1 - self.limit, self.limit - 1) + self.limit - 1]


class ScaleNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times one learned number."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.scale = eps, nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes and gives (..., d)."""
        x_wide = x.to(wide(x.dtype))
        return (x_wide * (x_wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.scale).to(x.dtype)


def build_norm(config: FlashConfig) -> nn.Module:
    """The norm before each unit, after the last one, and in the head of a masked model."""
    if config.norm == "scalenorm":
        return ScaleNorm()
    return (nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm)(config.hidden_size, eps=1e-5)


class OffsetScale(nn.Module):
    """Copies of the base z, gamma_h z + beta_h."""

    def __init__(self, dim: int, copies: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(copies, dim))
        self.beta = nn.Parameter(torch.zeros(copies, dim))

    def forward(self, z: torch.Tensor, keys: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(b, n, s), of queries and of keys, to (h, b, n, s), each rotated to its position."""
        base = z if keys is z else torch.stack((z, keys) * (len(self.gamma) // 2))
        first, second = (base * self.gamma[:, None, None] + self.beta[:, None, None]).chunk(2, -1)
        rotated = first * rows.cos - second * rows.sin, second * rows.cos + first * rows.sin
        return torch.cat(rotated, dim=-1).to(z.dtype)


class Grid:
    """Tokens ``(b, n, .)`` laid out in chunks ``(b, g, c, .)``, each row from the open slot of its chunk on.

    Slots without a token are zero, so that they have no weight anywhere.
    """

    def __init__(self, rows: Rows, c: int) -> None:
        fill = rows.start % c
        n = rows.positions.shape[1]
        self.c = c
        # With a state the chunk that will be open has to be on the grid, also where it is still empty.
        self.g = (n + c - 1) // c + 1 if rows.keep else -(-n // c)
        places = rows.positions - (rows.start - fill).unsqueeze(1)
        #: Slot of each token; that of padding is one too many, which is cut off.
        self.places = places.masked_fill(~rows.real, self.g * c).unsqueeze(-1)
        #: The chunk that is open after the tokens, (b,).
        self.last = (fill + rows.lengths) // c

    def put(self, x: torch.Tensor, open_chunk: Optional[torch.Tensor]) -> torch.Tensor:
        """(b, n, .) behind the tokens of the open chunk (b, c, .): (b, g, c, .)."""
        b, _, width = x.shape
        blank = x.new_zeros(b, self.g * self.c + 1, width)
        grid = blank.scatter(1, self.places.expand_as(x), x)[:, :-1].unflatten(1, (self.g, self.c))
        if open_chunk is None:
            return grid
        return torch.cat((grid[:, :1] + open_chunk.unsqueeze(1), grid[:, 1:]), dim=1)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(b, g, c, .) back to the tokens (b, n, .), zero at padding."""
        slots = functional.pad(x.flatten(1, 2), (0, 0, 0, 1))
        return slots.gather(1, self.places.expand(-1, -1, x.shape[-1]))

    def last_of(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to the open chunk: (b, ...) of (b, g, ...)."""
        return x[torch.arange(len(x), device=x.device), self.last]


class GatedAttentionUnit(nn.Module):
    """One layer, y = x + (u * attention(q, k, v)) W."""

    def __init__(self, config: FlashConfig) -> None:
        super().__init__()
        self.config, self.branches = config, BRANCHES[config.attention]
        self.sizes = (*[config.expansion_factor * config.hidden_size] * 2, config.attention_dim)
        self.norm = build_norm(config)
        self.uvz = nn.Linear(config.hidden_size, sum(self.sizes))
        self.offset_scale = OffsetScale(config.attention_dim, 2 * len(self.branches))
        self.out = nn.Linear(self.sizes[0], config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.bias = None
        if "quad" in self.branches:
            limit = config.n_ref if config.attention == "quadratic" else config.chunk_size
            toeplitz = config.relative_bias == "toeplitz"
            self.bias = ToeplitzBias(limit) if toeplitz else RotaryBias(config.attention_dim)

    def forward(
        self, x: torch.Tensor, rows: Rows, state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(b, n, d) to the same, and the state behind it; ``state`` is empty at the start of rows."""
        u, v, z = functional.silu(self.uvz(self.norm(x))).split(self.sizes, dim=-1)
        keys, before = self.shifted(z, rows, state) if self.config.shift_keys else (z, {})
        copies = self.offset_scale(z, keys, rows).unflatten(0, (-1, 2))
        tensors = dict(v=v)
        for branch, (q, k) in zip(self.branches, copies, strict=True):
            tensors |= {f"q_{branch}": q, f"k_{branch}": k}
        if self.config.attention == "quadratic":
            out, state = self.quadratic(tensors, rows, state)
        else:
            out, state = (self.step if rows.step and state else self.chunked)(tensors, rows, state)
        return x + self.dropout(self.out(u * out)), {**state, **before} if rows.keep else state

    def shifted(self, z: torch.Tensor, rows: Rows, state: dict[str, torch.Tensor]) -> tuple:
        """The z of the keys, half of its columns of the token before: (b, n, s), and the state."""
        s, latest = z.shape[2], rows.latest
        tokens = torch.cat((state["before"] if state else torch.zeros_like(z[:, :1]), z), dim=1)
        earlier = tokens.gather(1, functional.pad(latest[:, :-1], (1, 0)).unsqueeze(-1).expand_as(z))
        odd = torch.arange(s, device=z.device) % (s // 2) % 2 == 1
        return torch.where(odd, earlier, z), {
            "before": tokens.gather(1, latest[:, -1:, None].expand(-1, 1, s))
        }

    def chunked(self, new: dict[str, torch.Tensor], rows: Rows, state: dict[str, torch.Tensor]) -> tuple:
        """Attention of any number of tokens: (b, n, e), and the state."""
        c, causal, grid = self.config.chunk_size, self.config.causal, Grid(rows, self.config.chunk_size)
        compute = torch.float32 if new["v"].dtype == torch.float16 else new["v"].dtype
        on_grid = {name: grid.put(x, state.get(name)).to(compute) for name, x in new.items()}
        v, out, after = on_grid["v"], 0, {}
        if "quad" in self.branches:
            slots = torch.arange(c, device=v.device)
            distances = slots.unsqueeze(1) - slots
            bias = self.bias(c)[distances + c - 1].to(compute)
            if causal:
                bias = bias.masked_fill(distances < 0, -torch.inf)  # of which relu makes an exact zero
            scores = torch.einsum("bgis,bgjs->bgij", on_grid["q_quad"], on_grid["k_quad"]) / c + bias
            out = torch.einsum("bgij,bgje->bgie", scores.relu().square(), v)
        if "lin" in self.branches:
            kv = torch.einsum("bgjs,bgje->bgse", on_grid["k_lin"], v).to(wide(v.dtype))
            if causal:
                # Shifted, as "all chunks minus this one" would let its future through by rounding.
                before = state["kv_sum"].unsqueeze(1) if state else torch.zeros_like(kv[:, :1])
                sums = self.running_sum(torch.cat((before, kv[:, :-1]), dim=1))
                counts = (rows.start // c).unsqueeze(1) * c + torch.arange(grid.g, device=v.device) * c
            else:
                sums, counts = kv.sum(1, keepdim=True), rows.lengths.unsqueeze(1)
            mean = (sums / self.denominator(counts).unsqueeze(2).to(sums.dtype)).to(compute)
            out = out + torch.einsum("bgis,bgse->bgie", on_grid["q_lin"], mean)
            after = {"kv_sum": grid.last_of(sums)} if rows.keep else {}
        if rows.keep:
            kept = {name: on_grid[name] for name in new if not name.startswith("q_")}
            after |= {name: grid.last_of(x).to(new["v"].dtype) for name, x in kept.items()}
        return grid.take(out).to(new["v"].dtype), after

    def step(self, new: dict[str, torch.Tensor], rows: Rows, state: dict[str, torch.Tensor]) -> tuple:
        """As :meth:`chunked`, of one token a row: the same work at every position."""
        c, slot = self.config.chunk_size, (rows.start % self.config.chunk_size).view(-1, 1, 1)
        compute = torch.float32 if new["v"].dtype == torch.float16 else new["v"].dtype
        after = {
            name: state[name].scatter(1, slot.expand_as(x), x)
            for name, x in new.items()
            if not name.startswith("q_")
        }
        v, out = after["v"].to(compute), 0
        if "quad" in self.branches:
            # Slots that are still empty hold zeros in v: no mask.
            distances = slot.squeeze(2) - torch.arange(c, device=v.device)
            bias = self.bias(c)[distances + c - 1].unsqueeze(1).to(compute)
            q, k = new["q_quad"].to(compute), after["k_quad"].to(compute)
            scores = torch.einsum("bis,bjs->bij", q, k) / c + bias
            out = torch.einsum("bij,bje->bie", scores.relu().square(), v)
        full = slot == c - 1
        if "lin" in self.branches:
            after["kv_sum"] = kv_sum = state["kv_sum"]
            counts = self.denominator(rows.start // c * c).unsqueeze(1)
            mean = (kv_sum / counts.to(kv_sum.dtype)).to(compute)
            out = out + torch.einsum("bis,bse->bie", new["q_lin"].to(compute), mean)
        if full.any():  # the chunk closes: its summary joins the sum, and the next one begins empty
            if "lin" in self.branches:
                kv = torch.einsum("bjs,bje->bse", after["k_lin"].to(compute), v).to(kv_sum.dtype)
                new_sum = self.running_sum(torch.stack((kv_sum, kv), dim=1))[:, 1]
                after["kv_sum"] = torch.where(full, new_sum, kv_sum)
            after |= {name: after[name].masked_fill(full, 0) for name in after if name != "kv_sum"}
        return out.to(new["v"].dtype), after

    def denominator(self, counts: torch.Tensor) -> torch.Tensor:
        """What the linear branch is divided by, where so many tokens were summed: (..., 1), or (..., e)."""
        counts, c = counts.unsqueeze(-1), self.config.chunk_size
        if self.config.linear_norm == "chunk":
            return torch.full_like(counts, c)
        if self.config.linear_norm == "fading":
            kept = kept_shares(self.sizes[0], counts.device)
            counts = c * (1 - kept ** (counts // c)) / (1 - kept)
        return counts.clamp(min=1)

    def running_sum(self, kv: torch.Tensor) -> torch.Tensor:
        """Of every chunk and what is kept of all before it: takes and gives (b, g, s, e)."""
        if self.config.linear_norm != "fading":
            return kv.cumsum(1)
        kept, sums = kept_shares(kv.shape[-1], kv.device).to(kv.dtype), [kv[:, 0]]
        for chunk in kv[:, 1:].unbind(1):
            sums.append(torch.addcmul(chunk, sums[-1], kept))
        return torch.stack(sums, dim=1)

    def quadratic(self, new: dict[str, torch.Tensor], rows: Rows, state: dict[str, torch.Tensor]) -> tuple:
        """Attention over the whole row, relu(q k^T / n_ref + bias)^2 v; its state grows."""
        real = rows.real.unsqueeze(-1)
        keys = dict(
            k=new["k_quad"],
            v=new["v"].masked_fill(~real, 0),
            positions=rows.positions.masked_fill(~rows.real, NEVER),
        )
        if state:
            keys = {name: torch.cat((state[name], x), dim=1) for name, x in keys.items()}
        m = keys["v"].shape[1]
        compute = torch.float32 if new["v"].dtype == torch.float16 else new["v"].dtype
        distances = rows.positions.unsqueeze(2) - keys["positions"].unsqueeze(1)
        bias = self.bias(m)[distances.clamp(1 - m, m - 1) + m - 1].to(compute)
        denominator = rows.lengths.clamp(min=1).view(-1, 1, 1)
        if self.config.causal:
            bias, denominator = bias.masked_fill(distances < 0, -torch.inf), self.config.n_ref
        q = (new["q_quad"].to(wide(compute)) / denominator).to(compute)
        scores = torch.einsum("bis,bjs->bij", q, keys["k"].to(compute)) + bias
        out = torch.einsum("bij,bje->bie", scores.relu().square(), keys["v"].to(compute))
        return out.to(new["v"].dtype), keys if rows.keep else {}


class ScaledSin(nn.Module):
    """Absolute positions at the input, [sin | cos] times one learned number."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.alpha = dim, nn.Parameter(torch.full((1,), dim**-0.5))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """(b, n) to (b, n, d)."""
        cos, sin = angles(positions, self.dim, wide(self.alpha.dtype))
        return torch.cat((sin, cos), dim=-1).to(self.alpha.dtype) * self.alpha


class FlashPreTrainedModel(PreTrainedModel):
    """What transformers asks of all models."""

    config_class = FlashConfig
    base_model_prefix = "model"
    _no_split_modules = ["GatedAttentionUnit"]  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the paper: N(0, 0.02); norms, offsets and the rest as they are built."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(std=0.02)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif isinstance(module, OffsetScale):
            module.gamma.normal_(std=0.02)
            module.beta.zero_()


class FlashModel(FlashPreTrainedModel):
    """Embedding, units, norm."""

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = ScaledSin(config.hidden_size) if config.scaled_sin else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(GatedAttentionUnit(config) for _ in range(config.num_hidden_layers))
        self.final_norm = build_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding of the tokens."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        cache: Optional[FlashCache] = None,
        use_cache: Optional[bool] = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Features of tokens.

        Args:
            input_ids: ``(b, n)``.
            attention_mask: ``(b, n)``, 0 at padding, which is as if it were not there; or longer, of which
                the last ``n`` columns count. None where padding is what has the index of padding.
            cache: What came before; is brought up to date.
            use_cache: Whether a cache is given back; as the configuration says by default.
            unused: What transformers passes to every model.
        """
        config, n = self.config, input_ids.shape[1]
        real = input_ids != config.pad_token_id if attention_mask is None else attention_mask[:, -n:].bool()
        use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None and use_cache and config.causal:
            cache = FlashCache(config.num_hidden_layers)
        begins = cache is None or cache.position is None
        start = real.new_zeros(len(real), dtype=torch.long) if begins else cache.position
        positions = start.unsqueeze(1) + (real.cumsum(1) - 1).clamp(min=0)
        if config.attention == "quadratic" and config.relative_bias == "toeplitz":
            longest = int(positions.max()) + 1
            if longest > config.n_ref:
                raise ValueError(f"a row has {longest} tokens; allowed: {config.n_ref}, as many as its table")
        cos, sin = angles(positions, config.attention_dim, wide(self.dtype))
        step = n == 1 and not begins and bool(real.all())
        rows = Rows(real, start, positions, cos, sin, step, cache is not None)
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x, state = block(x, rows, {} if cache is None else cache.states[index])
            if cache is not None:
                cache.states[index] = state
        if cache is not None:
            cache.position, cache.columns = start + rows.lengths, cache.columns + n
        x = self.final_norm(x).masked_fill(~real.unsqueeze(-1), 0)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})


class FlashForCausalLM(FlashPreTrainedModel, GenerationMixin):
    """A causal model: predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.model = FlashModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        cache: Optional[FlashCache] = None,
        past_key_values: Optional[FlashCache] = None,
        use_cache: Optional[bool] = None,
        labels: Optional[torch.Tensor] = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As :meth:`FlashModel.forward`, with logits ``(b, n, words)``, or of the last ``logits_to_keep``.

        ``past_key_values`` is an older name of ``cache``; ``labels`` are the input, with -100 where no loss
        is wanted.
        """
        cache = past_key_values if cache is None else cache
        found = self.model(input_ids, attention_mask, cache, use_cache)
        logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            kept = {name: others[name] for name in ("num_items_in_batch",) if name in others}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kept)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(found, CACHE)})
        return output if others.get("return_dict") is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        cache: Optional[FlashCache] = None,
        past_key_values: Optional[FlashCache] = None,
        use_cache: Optional[bool] = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Of the whole rows so far, what the cache has not seen."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            input_ids = input_ids[:, cache.columns :]
        # Without a mask, here nothing is padding: not even what the model has written.
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return dict(
            input_ids=input_ids,
            attention_mask=mask,
            cache=cache,
            use_cache=use_cache,
            logits_to_keep=1,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the model makes its own."""
        return False


class MaskedLMHead(nn.Module):
    """Logits of the words, norm(gelu(x W)) E^T + bias."""

    def __init__(self, config: FlashConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = build_norm(config)
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(b, n, d) to (b, n, words)."""
        return functional.linear(self.norm(functional.gelu(self.dense(features))), self.weight, self.bias)


class FlashForMaskedLM(FlashPreTrainedModel):
    """A bidirectional model: fills in masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.model = FlashModel(config)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        **others: Any,
    ) -> MaskedLMOutput:
        """Logits ``(b, n, words)``; ``labels`` are the tokens under the masks, -100 elsewhere."""
        logits = self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            kept = {name: others[name] for name in ("num_items_in_batch",) if name in others}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kept)
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output if others.get("return_dict") is not False else output.to_tuple()
