"""Hands the weights of our modules to the oracle: the one place that knows both sides."""

import torch

from fairseq_flash.modules import (
    GatedAttentionUnit,
    GatedCrossAttention,
    RotaryBias,
    ScaleNorm,
    Stack,
    TransformerBlock,
)
from support import oracle


def norm(module: torch.nn.Module) -> tuple[str, dict]:
    """The oracle's name of a norm and its arguments."""
    if isinstance(module, ScaleNorm):
        return "scale_norm", dict(g=module.scale, eps=module.eps)
    if isinstance(module, torch.nn.RMSNorm):
        return "rms_norm", dict(weight=module.weight, eps=module.eps)
    return "layer_norm", dict(weight=module.weight, bias=module.bias, eps=module.eps)


def unit(module: GatedAttentionUnit, parameters: dict | None = None):
    """The oracle of one layer as a function of a row (n, d); ``parameters`` replaces the layer's own."""
    kind, own = unit_parameters(module)
    parameters = parameters or own
    bias = None if module.bias is None else "rotary" if isinstance(module.bias, RotaryBias) else "toeplitz"
    quadratic = module.attention == "quadratic"

    def function(x):
        return oracle.gated_attention_unit(
            x,
            parameters,
            attention=module.attention,
            causal=module.causal,
            chunk_size=module.chunk_size,
            linear_norm=module.linear_norm,
            norm=kind,
            denominator=int(module.n_ref) if quadratic and module.causal else None,
            bias=bias,
            shift_keys=module.shift_keys,
        )

    return function


def unit_parameters(module: GatedAttentionUnit) -> tuple[str, dict]:
    """The oracle's name of the layer's norm, and the layer's parameters under the oracle's names."""
    kind, norm_parameters = norm(module.norm)
    parameters = dict(
        norm=norm_parameters,
        uvz_weight=module.uvz.weight,
        uvz_bias=module.uvz.bias,
        gamma=module.offset_scale.gamma,
        beta=module.offset_scale.beta,
        out_weight=module.out.weight,
        out_bias=module.out.bias,
    )
    if module.bias is not None:
        parameters.update(module.bias.named_parameters())
    return kind, parameters


def transformer(module: TransformerBlock):
    """The oracle of a Transformer layer as a function of a row (n, d)."""
    kind, norm_parameters = norm(module.norm)
    parameters = dict(norm=norm_parameters, ffn_norm=norm(module.ffn_norm)[1])
    for name in ("qkv", "out", "ffn_in", "ffn_out"):
        linear = getattr(module, name)
        parameters.update({f"{name}_weight": linear.weight, f"{name}_bias": linear.bias})
    for name in ("q", "k") if "lin" in module.branches else ():
        scale = getattr(module, f"{name}_scale")
        parameters.update({f"{name}_gamma": scale.gamma[0], f"{name}_beta": scale.beta[0]})

    def function(x):
        return oracle.transformer_block(
            x,
            parameters,
            attention=module.attention,
            head_dim=module.attention_dim,
            chunk_size=module.chunk_size,
            linear_norm=module.linear_norm,
            norm=kind,
            glu=module.glu,
        )

    return function


def cross_unit(module: GatedCrossAttention):
    """The oracle of a layer that attends to a source, as a function of a row (n, d) and a source (m, d)."""
    kind, parameters = cross_unit_parameters(module)
    return lambda x, source: oracle.gated_cross_attention(x, source, parameters, norm=kind)


def cross_unit_parameters(module: GatedCrossAttention) -> tuple[str, dict]:
    """As :func:`unit_parameters`."""
    kind, norm_parameters = norm(module.norm)
    parameters = dict(
        norm=norm_parameters,
        uz_weight=module.uz.weight,
        uz_bias=module.uz.bias,
        vz_weight=module.vz.weight,
        vz_bias=module.vz.bias,
        q_gamma=module.q_scale.gamma[0],
        q_beta=module.q_scale.beta[0],
        k_gamma=module.k_scale.gamma[0],
        k_beta=module.k_scale.beta[0],
        out_weight=module.out.weight,
        out_bias=module.out.bias,
    )
    return kind, parameters


def sequence_to_sequence_parameters(model: torch.nn.Module) -> dict:
    """The parameters of a flash_seq2seq under the oracle's names."""
    encoder, decoder = (_stack_parameters(side.stack) for side in (model.encoder, model.decoder))
    encoder["layers"] = [unit_parameters(block)[1] for block in model.encoder.stack.blocks]
    decoder["layers"] = [
        {
            "self": unit_parameters(block.self_attention)[1],
            "cross": cross_unit_parameters(block.cross_attention)[1],
        }
        for block in model.decoder.stack.blocks
    ]
    decoder["output_weight"] = model.decoder.output_projection.weight
    return dict(encoder=encoder, decoder=decoder)


def _stack_parameters(module: Stack) -> dict:
    return dict(
        embedding=module.embed_tokens.weight,
        alpha=0.0 if module.embed_positions is None else module.embed_positions.alpha,
        norm=norm(module.final_norm)[1],
    )


def stack(module: Stack):
    """The oracle of a stack of gated attention units, from tokens (n,) to features (n, d)."""
    embedding, positions = module.embed_tokens.weight, module.embed_positions
    alpha = 0.0 if positions is None else positions.alpha
    kind, final_norm = norm(module.final_norm)

    def function(tokens):
        x = [
            embedding[t].double() + oracle.scaled_sin(i, embedding.shape[1], alpha)
            for i, t in enumerate(tokens)
        ]
        x = torch.stack(x)
        for block in module.blocks:
            x = unit(block)(x)
        return torch.stack([oracle.NORMS[kind](x_i, **final_norm) for x_i in x])

    return function
