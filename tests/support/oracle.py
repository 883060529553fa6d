"""The judge of every implementation: FLASH token by token, in float64, in plain loops.

Imports nothing of fairseq_flash and shares no trick with it: no chunked product, no running sum, no batch.
Each function takes one row of real tokens; padding is removed beforehand (`padded`), so position and chunk 0
begin at the first real token. Tensors are brought to float64 on the CPU; autograd passes through.

Letters: n tokens, d model, e expanded, s query/key dimension, c chunk, h offset-scale heads, i/j query/key.
"""

import math
from collections.abc import Callable, Sequence

import torch

Bias = Callable[[int, int], torch.Tensor | float]


def _float64(x) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64, device="cpu")


def _rows(rows: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Stacks vectors; no vectors give (0, width), which an all-padding row needs."""
    return torch.stack(list(rows)) if rows else torch.zeros(0, width, dtype=torch.float64)


def _dense(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (o, d), x (d,) -> (o,)."""
    return torch.stack([torch.dot(row, x) for row in weight])


def silu(x) -> torch.Tensor:
    """x / (1 + exp(-x)), any shape."""
    x = _float64(x)
    return x / (1 + torch.exp(-x))


def rotary(x, position: int) -> torch.Tensor:
    """Turns the pair (x[i], x[i + s/2]) by position * 10000^(-i / (s/2)). x (s,) -> (s,)."""
    x = _float64(x)
    half = len(x) // 2
    first, second = [], []
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        x1, x2 = x[i], x[i + half]
        first.append(x1 * math.cos(angle) - x2 * math.sin(angle))
        second.append(x2 * math.cos(angle) + x1 * math.sin(angle))
    return torch.stack(first + second)


def scaled_sin(position: int, d: int, alpha) -> torch.Tensor:
    """alpha * [sin | cos](position * 10000^(-i / (d/2))), i in 0..d/2-1. -> (d,)."""
    angles = [position * 10000.0 ** (-i / (d / 2)) for i in range(d // 2)]
    return _float64(alpha) * _float64([math.sin(t) for t in angles] + [math.cos(t) for t in angles])


def scale_norm(x, g, eps: float) -> torch.Tensor:
    """g * x / sqrt(mean(x^2) + eps); x (d,), g a scalar."""
    x = _float64(x)
    return _float64(g) * x / torch.sqrt((x * x).mean() + eps)


def rms_norm(x, weight, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps); x and weight (d,)."""
    return _float64(weight) * scale_norm(x, 1.0, eps)


def layer_norm(x, weight, bias, eps: float) -> torch.Tensor:
    """weight * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) + bias; x, weight and bias (d,)."""
    x = _float64(x)
    centred = x - x.mean()
    return _float64(weight) * centred / torch.sqrt((centred * centred).mean() + eps) + _float64(bias)


NORMS = {"scale_norm": scale_norm, "layer_norm": layer_norm, "rms_norm": rms_norm}


def toeplitz_bias(table, i: int, j: int, limit: int) -> torch.Tensor:
    """table[(i - j) + limit - 1]; table (2 * limit - 1,), |i - j| < limit."""
    if len(table) != 2 * limit - 1 or abs(i - j) >= limit:
        raise ValueError(f"table has {len(table)} entries, limit is {limit}, distance is {i - j}")
    return _float64(table[(i - j) + limit - 1])


def rotary_bias(a, b, i: int, j: int) -> torch.Tensor:
    """rotary(a, i) . rotary(b, j), a function of i - j alone; a and b (s,)."""
    return torch.dot(rotary(a, i), rotary(b, j))


def _relu_squared(score: torch.Tensor) -> torch.Tensor:
    return score * score if score > 0 else 0 * score


def quadratic_attention(q, k, v, bias: Bias | None, causal: bool, denominator: float) -> torch.Tensor:
    """out_i = sum_j relu(q_i . k_j / denominator + bias(i, j))^2 v_j, over j <= i if causal, else over all j.

    q and k (n, s), v (n, e) -> (n, e).
    """
    q, k, v = _float64(q), _float64(k), _float64(v)
    out = []
    for i in range(len(q)):
        out_i = torch.zeros(v.shape[1], dtype=torch.float64)
        for j in range(len(k)):
            if j <= i or not causal:
                score = torch.dot(q[i], k[j]) / denominator + (bias(i, j) if bias else 0)
                out_i = out_i + _relu_squared(score) * v[j]
        out.append(out_i)
    return _rows(out, v.shape[1])


def mixed_chunk_attention(
    q_quad,
    k_quad,
    q_lin,
    k_lin,
    v,
    bias: Bias | None,
    causal: bool,
    chunk_size: int,
    linear_norm: str,
    branch: str = "both",
) -> torch.Tensor:
    """out_i = local_i + global_i, or one of the two ("local", "global"); C(i) = i // c is the chunk of i.

    local_i  = sum over j with C(j) = C(i), and j <= i if causal, of
               relu(q_quad_i . k_quad_j / c + bias(i % c, j % c))^2 v_j
    global_i = sum over j with C(j) < C(i) if causal, else over all j, of (q_lin_i . k_lin_j) v_j / divisor
    divisor  = c for linear_norm="chunk"; for "mean" max(1, tokens with C(j) < C(i)) if causal, else max(1, n)

    linear_norm="fading", if causal: column x of v_j counts w_ij(x) = 2^-((C(i) - C(j) - 1) / half-life(x))
    times, and the divisor is the sum of these weights, or 1; see fading_half_lives.

    q and k (n, s), v (n, e) -> (n, e). The pair that `branch` leaves out may be None.
    """
    if branch not in ("both", "local", "global") or linear_norm not in ("chunk", "mean", "fading"):
        raise ValueError(f"branch={branch!r}, linear_norm={linear_norm!r}")
    q_quad, k_quad, q_lin, k_lin, v = (
        None if x is None else _float64(x) for x in (q_quad, k_quad, q_lin, k_lin, v)
    )
    n, c = len(v), chunk_size
    out = []
    for i in range(n):
        out_i = torch.zeros(v.shape[1], dtype=torch.float64)
        if branch != "global":
            for j in range(n):
                if i // c == j // c and (j <= i or not causal):
                    score = torch.dot(q_quad[i], k_quad[j]) / c + (bias(i % c, j % c) if bias else 0)
                    out_i = out_i + _relu_squared(score) * v[j]
        if branch != "local":
            seen = [j for j in range(n) if j // c < i // c or not causal]
            out_i = out_i + _seen_linearly(q_lin[i], k_lin, v, i, seen, c, linear_norm)
        out.append(out_i)
    return _rows(out, v.shape[1])


def _seen_linearly(q_i, k, v, i: int, seen: Sequence[int], c: int, linear_norm: str) -> torch.Tensor:
    """sum over the seen j of (q_i . k_j) w_ij v_j / divisor, as for mixed_chunk_attention."""
    divisor = c if linear_norm == "chunk" else max(1, len(seen))
    weights = [torch.ones(v.shape[1], dtype=torch.float64) for _ in seen]
    if linear_norm == "fading" and seen:
        lives = fading_half_lives(v.shape[1])
        weights = [0.5 ** ((i // c - j // c - 1) / lives) for j in seen]
        divisor = sum(weights)
    out_i = torch.zeros(v.shape[1], dtype=torch.float64)
    for j, weight in zip(seen, weights, strict=True):
        out_i = out_i + torch.dot(q_i, k[j]) * weight / divisor * v[j]
    return out_i


def fading_half_lives(e: int) -> torch.Tensor:
    """In chunks, of each column (e,): h = gcd(16, e) groups of e / h columns, group p of them
    16^(p / (h - 1)); 1 if there is one group."""
    h = math.gcd(16, e)
    lives = [16.0 ** (p / (h - 1) if h > 1 else 0) for p in range(h)]
    return torch.tensor([lives[x // (e // h)] for x in range(e)], dtype=torch.float64)


def valid_rows(x: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """The real tokens of one row: x (n, ...), padding_mask (n,), True = padding -> (m, ...), dtype kept.

    Padding leads or trails; padding between real tokens is a ValueError.
    """
    real = [j for j in range(len(x)) if not padding_mask[j]]
    if real and real != list(range(real[0], real[-1] + 1)):
        raise ValueError(f"padding_mask has padding between real tokens; real positions are {real}")
    return x[real]


def padded(
    function: Callable[..., torch.Tensor], padding_mask: torch.Tensor | None, *batches: torch.Tensor
) -> torch.Tensor:
    """function(*rows) for every row of a batch on its real tokens alone; zeros where there is padding.

    batches (b, n, ...), padding_mask (b, n) or None; function gives (m, w) for m >= 0 tokens. -> (b, n, w).
    """
    if padding_mask is None:
        padding_mask = torch.zeros(batches[0].shape[:2], dtype=torch.bool)
    out = []
    for row, row_mask in enumerate(padding_mask):
        computed = function(*(valid_rows(batch[row], row_mask) for batch in batches))
        zero, token = torch.zeros(computed.shape[1], dtype=torch.float64), iter(computed)
        out.append(torch.stack([zero if is_padding else next(token) for is_padding in row_mask]))
    return torch.stack(out)


def _bias(kind: str | None, parameters: dict) -> Bias | None:
    if kind == "toeplitz":
        table = parameters["table"]
        return lambda i, j: toeplitz_bias(table, i, j, (len(table) + 1) // 2)
    if kind == "rotary":
        return lambda i, j: rotary_bias(parameters["a"], parameters["b"], i, j)
    if kind is not None:
        raise ValueError(f"bias={kind!r}; allowed: 'toeplitz', 'rotary', None")
    return None


def gated_attention_unit(
    x,
    parameters: dict,
    *,
    attention: str,
    causal: bool,
    chunk_size: int | None = None,
    linear_norm: str = "chunk",
    norm: str = "scale_norm",
    denominator: float | None = None,
    bias: str | None = "toeplitz",
    shift_keys: bool = False,
) -> torch.Tensor:
    """y = x + W_o (u * attention(q, k, v)) + b_o;  u, v, z = split(silu(W norm(x) + b), [e, e, s]).

    Head h is rotary(gamma_h * z + beta_h), in the order q, k ("quadratic"), q_quad, k_quad, q_lin, k_lin
    ("mixed_chunk"), q_quad, k_quad ("local"), q_lin, k_lin ("global"). x (n, d) -> (n, d).

    parameters: `norm` (the norm's arguments: {g, eps}, {weight, eps} or {weight, bias, eps}), `uvz_weight`
    (2e+s, d), `uvz_bias` (2e+s,), `gamma`, `beta` (h, s), `out_weight` (d, e), `out_bias` (d,); for the bias
    `table` (2 * limit - 1,) or `a`, `b` (s,). `denominator` is for "quadratic"; None: the tokens of this row
    (bidirectional only).

    shift_keys: column x of z in the keys is that of the token before, 0 at the first, where x mod s/2 is odd.
    """
    x, gamma, beta = _float64(x), _float64(parameters["gamma"]), _float64(parameters["beta"])
    uvz_weight, uvz_bias = _float64(parameters["uvz_weight"]), _float64(parameters["uvz_bias"])
    out_weight, out_bias = _float64(parameters["out_weight"]), _float64(parameters["out_bias"])
    e, s = out_weight.shape[1], gamma.shape[1]
    branches = {"mixed_chunk": "both", "local": "local", "global": "global"}
    if attention != "quadratic" and attention not in branches:
        raise ValueError(f"attention={attention!r}; allowed: 'quadratic', {sorted(branches)}")
    if len(gamma) != (4 if attention == "mixed_chunk" else 2):
        raise ValueError(f"gamma has {len(gamma)} heads, which attention={attention!r} does not take")

    u, v, heads, before = [], [], [[] for _ in gamma], torch.zeros(s, dtype=torch.float64)
    for i in range(len(x)):
        uvz = silu(_dense(uvz_weight, NORMS[norm](x[i], **parameters["norm"])) + uvz_bias)
        u.append(uvz[:e])
        v.append(uvz[e : 2 * e])
        z = uvz[2 * e :]
        key_base = [before[y] if shift_keys and y % (s // 2) % 2 else z[y] for y in range(s)]
        for h in range(len(gamma)):
            base = torch.stack(key_base) if h % 2 else z
            heads[h].append(rotary(gamma[h] * base + beta[h], i))
        before = z
    heads = [_rows(head, s) for head in heads]
    v = _rows(v, e)

    bias_at = _bias(bias, parameters)
    if attention == "quadratic":
        if denominator is None and causal:
            raise ValueError("denominator=None with causal=True: scores would depend on the row length")
        divisor = len(x) if denominator is None else denominator
        attended = quadratic_attention(*heads, v, bias_at, causal, divisor)
    else:
        quad = heads[:2] if attention != "global" else [None, None]
        lin = heads[-2:] if attention != "local" else [None, None]
        branch = branches[attention]
        attended = mixed_chunk_attention(*quad, *lin, v, bias_at, causal, chunk_size, linear_norm, branch)
    y = [x[i] + _dense(out_weight, u[i] * attended[i]) + out_bias for i in range(len(x))]
    return _rows(y, x.shape[1])


def cross_attention(q, k, v) -> torch.Tensor:
    """out_i = sum_j relu(q_i . k_j / sqrt(s))^2 v_j / m. q (n, s), k (m, s), v (m, e) -> (n, e)."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    out = []
    for q_i in q:
        out_i = torch.zeros(v.shape[1], dtype=torch.float64)
        for k_j, v_j in zip(k, v, strict=True):
            out_i = out_i + _relu_squared(torch.dot(q_i, k_j) / math.sqrt(len(q_i))) * v_j / len(k)
        out.append(out_i)
    return _rows(out, v.shape[1])


def gated_cross_attention(x, source, parameters: dict, *, norm: str = "layer_norm") -> torch.Tensor:
    """y = x + W_o (u * cross_attention(q, k, v)) + b_o, with a source that has been normalised already.

    u, z = split(silu(W norm(x) + b), [e, s]) of the row, v, z' = split(silu(W' source + b'), [e, s]) of the
    source; q = gamma * z + beta, k = gamma' * z' + beta'. x (n, d), source (m, d) -> (n, d).

    parameters: `norm` (the norm's arguments), `uz_weight`, `vz_weight` (e+s, d), `uz_bias`, `vz_bias` (e+s,),
    `q_gamma`, `q_beta`, `k_gamma`, `k_beta` (s,), `out_weight` (d, e), `out_bias` (d,).
    """
    x, source = _float64(x), _float64(source)
    p = {name: value if isinstance(value, dict) else _float64(value) for name, value in parameters.items()}
    e, s = p["out_weight"].shape[1], len(p["q_gamma"])
    u, q, k, v = [], [], [], []
    for x_i in x:
        uz = silu(_dense(p["uz_weight"], NORMS[norm](x_i, **p["norm"])) + p["uz_bias"])
        u.append(uz[:e])
        q.append(p["q_gamma"] * uz[e:] + p["q_beta"])
    for source_j in source:
        vz = silu(_dense(p["vz_weight"], source_j) + p["vz_bias"])
        v.append(vz[:e])
        k.append(p["k_gamma"] * vz[e:] + p["k_beta"])
    attended = cross_attention(_rows(q, s), _rows(k, s), _rows(v, e))
    y = [x[i] + _dense(p["out_weight"], u[i] * attended[i]) + p["out_bias"] for i in range(len(x))]
    return _rows(y, x.shape[1])


def _softmax_average(scores: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_j exp(s_j) v_j / sum_j exp(s_j)."""
    highest = max(score.item() for score in scores)
    weights = [torch.exp(score - highest) for score in scores]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def softmax_head(
    q, k, q_lin, k_lin, v, attention: str, chunk_size: int | None, linear_norm: str
) -> torch.Tensor:
    """One causal head of a Transformer: out_i = near_i + far_i; C(i) = i // c is the chunk of i.

    near_i = softmax over j <= i ("quadratic"), or j <= i with C(j) = C(i) ("mixed_chunk", "local"), of
             q_i . k_j / sqrt(r), times v_j; absent for "global"
    far_i  = sum over j with C(j) < C(i) of (q_lin_i . k_lin_j) v_j / divisor ("mixed_chunk", "global")
    divisor, and fading, as in mixed_chunk_attention, of each head's own columns. q, k, v (n, r) -> (n, r).
    """
    out = []
    for i in range(len(v)):
        out_i = torch.zeros(v.shape[1], dtype=torch.float64)
        if attention != "global":
            seen = [j for j in range(i + 1) if attention == "quadratic" or j // chunk_size == i // chunk_size]
            scores = [torch.dot(q[i], k[j]) / math.sqrt(q.shape[1]) for j in seen]
            out_i = out_i + _softmax_average(scores, [v[j] for j in seen])
        if attention in ("mixed_chunk", "global"):
            earlier = [j for j in range(i) if j // chunk_size < i // chunk_size]
            out_i = out_i + _seen_linearly(q_lin[i], k_lin, v, i, earlier, chunk_size, linear_norm)
        out.append(out_i)
    return _rows(out, v.shape[1])


def transformer_block(
    x,
    parameters: dict,
    *,
    attention: str,
    head_dim: int,
    chunk_size: int | None = None,
    linear_norm: str = "chunk",
    norm: str = "layer_norm",
    glu: bool = False,
) -> torch.Tensor:
    """x' = x + W_o heads(norm(x));  y = x' + W_2 f(W_1 norm'(x')), causal. x (n, d) -> (n, d).

    q, k, v = split(W norm(x) + b, 3); head h holds the numbers h r to (h + 1) r - 1 of each, q and k rotated.
    q_lin, k_lin are rotary(gamma * q + beta), head by head. f is relu, or with `glu`, silu(first half) *
    second half.

    parameters: `norm`, `ffn_norm` (the norms' arguments), `qkv_weight` (3d, d), `qkv_bias`, `out_weight`
    (d, d), `out_bias`, `ffn_in_weight` (f or 2f, d), `ffn_in_bias`, `ffn_out_weight` (d, f), `ffn_out_bias`;
    for the linear branch `q_gamma`, `q_beta`, `k_gamma`, `k_beta` (d,).
    """
    x = _float64(x)
    p = {name: value if isinstance(value, dict) else _float64(value) for name, value in parameters.items()}
    d, r = x.shape[1], head_dim
    q, k, v = [], [], []
    for x_i in x:
        qkv = _dense(p["qkv_weight"], NORMS[norm](x_i, **p["norm"])) + p["qkv_bias"]
        q.append(qkv[:d])
        k.append(qkv[d : 2 * d])
        v.append(qkv[2 * d :])
    heads = []
    for begin in range(0, d, r):
        own = slice(begin, begin + r)
        q_lin = k_lin = None
        if attention in ("mixed_chunk", "global"):
            q_lin = _rows(
                [rotary(p["q_gamma"][own] * q[i][own] + p["q_beta"][own], i) for i in range(len(x))], r
            )
            k_lin = _rows(
                [rotary(p["k_gamma"][own] * k[i][own] + p["k_beta"][own], i) for i in range(len(x))], r
            )
        near_q = _rows([rotary(q[i][own], i) for i in range(len(x))], r)
        near_k = _rows([rotary(k[i][own], i) for i in range(len(x))], r)
        own_v = _rows([v_i[own] for v_i in v], r)
        heads.append(softmax_head(near_q, near_k, q_lin, k_lin, own_v, attention, chunk_size, linear_norm))
    y = []
    for i in range(len(x)):
        x_i = x[i] + _dense(p["out_weight"], torch.cat([head[i] for head in heads])) + p["out_bias"]
        hidden = _dense(p["ffn_in_weight"], NORMS[norm](x_i, **p["ffn_norm"])) + p["ffn_in_bias"]
        if glu:
            half = len(hidden) // 2
            hidden = silu(hidden[:half]) * hidden[half:]
        else:
            hidden = torch.stack([value if value > 0 else 0 * value for value in hidden])
        y.append(x_i + _dense(p["ffn_out_weight"], hidden) + p["ffn_out_bias"])
    return _rows(y, d)


BLOCKS = {"gau": gated_attention_unit, "transformer": transformer_block}


def stack(
    tokens,
    parameters: dict,
    *,
    norm: str = "scale_norm",
    block: str = "gau",
    embed_scale: float = 1.0,
    **options,
) -> torch.Tensor:
    """logits_i = W norm(x_i), x = block_L(... block_1(embed_scale * embedding[token_i] + scaled_sin(i))).

    tokens (n,) -> (n, words). parameters: `embedding` (words, d), `alpha` (scalar), `layers` (a list of the
    block's parameters), `norm` (the final norm's arguments), `output_weight` (words, d).
    `norm` and `options` go to every layer.
    """
    x = _embedded(tokens, parameters, embed_scale)
    for layer in parameters["layers"]:
        x = BLOCKS[block](x, layer, norm=norm, **options)
    return _logits(x, parameters, norm)


def sequence_to_sequence(
    source, target, parameters: dict, *, norm: str = "layer_norm", n_ref: int | None = None, **options
) -> torch.Tensor:
    """Logits (n, words) of the target's tokens (n,), given the source's (m,).

    x' = norm(unit_L(... unit_1(embedding[source]))), bidirectional; then x = cross_l(self_l(x), x') in each
    layer of the decoder, causal. parameters: `encoder` as for `stack` without `output_weight`, and `decoder`
    as for `stack` with layers {self, cross}. `n_ref` divides the scores of causal "quadratic" attention;
    `norm` and `options` go to every unit.
    """
    encoder, decoder = parameters["encoder"], parameters["decoder"]
    memory = _embedded(source, encoder)
    for layer in encoder["layers"]:
        memory = gated_attention_unit(memory, layer, norm=norm, causal=False, **options)
    memory = [NORMS[norm](x_j, **encoder["norm"]) for x_j in memory]
    memory = _rows(memory, _float64(encoder["embedding"]).shape[1])
    x = _embedded(target, decoder)
    for layer in decoder["layers"]:
        x = gated_attention_unit(x, layer["self"], norm=norm, causal=True, denominator=n_ref, **options)
        x = gated_cross_attention(x, memory, layer["cross"], norm=norm)
    return _logits(x, decoder, norm)


def _embedded(tokens, parameters: dict, embed_scale: float = 1.0) -> torch.Tensor:
    embedding, alpha = _float64(parameters["embedding"]), parameters["alpha"]
    d = embedding.shape[1]
    return _rows([embed_scale * embedding[int(t)] + scaled_sin(i, d, alpha) for i, t in enumerate(tokens)], d)


def _logits(x: torch.Tensor, parameters: dict, norm: str) -> torch.Tensor:
    weight = _float64(parameters["output_weight"])
    return _rows([_dense(weight, NORMS[norm](x_i, **parameters["norm"])) for x_i in x], len(weight))


def gelu(x) -> torch.Tensor:
    """x times the probability that a standard normal number is below x, any shape."""
    x = _float64(x)
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def masked_lm_head(x, parameters: dict, norm: str = "layer_norm") -> torch.Tensor:
    """logits_i = W_o norm(gelu(W x_i + b)) + b_o, as RoBERTa's. x (n, d) -> (n, words).

    parameters: `weight` (d, d), `bias`, `norm` (the norm's arguments), `output_weight` (words, d),
    `output_bias`.
    """
    p = {name: value if isinstance(value, dict) else _float64(value) for name, value in parameters.items()}
    hidden = [NORMS[norm](gelu(_dense(p["weight"], x_i) + p["bias"]), **p["norm"]) for x_i in _float64(x)]
    return _rows([_dense(p["output_weight"], h) + p["output_bias"] for h in hidden], len(p["output_bias"]))


def classification_head(x, parameters: dict) -> torch.Tensor:
    """logits = W_o tanh(W x_0 + b) + b_o of the first token alone, as RoBERTa's. x (n, d) -> (classes,)."""
    p = {name: _float64(value) for name, value in parameters.items()}
    hidden = torch.tanh(_dense(p["weight"], _float64(x)[0]) + p["bias"])
    return _dense(p["output_weight"], hidden) + p["output_bias"]
