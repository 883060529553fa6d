"""A language model of random weights whose generation can start at any position, for benchmarks."""

import argparse
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
)
from fairseq.sequence_generator import EnsembleModel

from bench.models import bytes_of, language_models
from fairseq_flash.modules import DecodingState
from fairseq_flash.ops import KeyValueCache

TOLERANCE = 1e-3  # of the largest logit, in float32; measured: 2e-6


class Contender:
    """A model of random weights, with an incremental state that can start at any position.

    Args:
        name: A registered architecture.
        vocabulary: Number of words.
        device: Where it runs.
        dtype: Of its weights.
        overrides: Options that differ from the architecture's, as far as the model has them.

    Raises:
        ValueError: there is no such language model.
    """

    def __init__(self, name: str, vocabulary: int, device: str, dtype: torch.dtype, overrides: dict) -> None:
        if name not in language_models():
            raise ValueError(f"--systems {name} is unknown; allowed: {', '.join(language_models())}")
        words = Dictionary()
        for word in range(vocabulary - len(words)):
            words.add_symbol(str(word))
        task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
        torch.manual_seed(1)
        self.name, self.cfg = name, _config(name, overrides)
        self.model = ARCH_MODEL_REGISTRY[name].build_model(self.cfg, task).to(device, dtype).eval()
        self.ensemble = EnsembleModel([self.model])
        self.vocabulary, self.device, self.dtype = len(words), device, dtype
        self._read: tuple[int, Optional[DecodingState]] = (0, None)

    @property
    def has_state(self) -> bool:
        """Whether a prompt can be read at once."""
        return hasattr(self.model.decoder, "continue_from")

    @property
    def grows(self) -> bool:
        """Whether the state grows with the position: then only its size matters, not what was read."""
        if not self.has_state:
            return True
        layers = self.model.decoder.stack.empty_state(torch.zeros(1, 1, device="meta")).layers
        return any(isinstance(layer, KeyValueCache) for layer in layers)

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Random words."""
        return torch.randint(4, self.vocabulary, (rows, length), device=self.device)

    def start(self, position: int, rows: int) -> tuple[dict, torch.Tensor]:
        """An incremental state before the token at ``position``, and the tokens that fairseq would pass."""
        incremental: dict = {}
        if self.has_state:
            state = self._state(position, rows)
            self.model.decoder.continue_from(incremental, state)
            return incremental, self.tokens(rows, 1)
        for layer in self.model.decoder.layers:
            attention = layer.self_attn
            shape = (rows, attention.num_heads, position, attention.head_dim)
            pair = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            saved = dict(zip(("prev_key", "prev_value"), pair, strict=True))
            attention._set_input_buffer(incremental, {**saved, "prev_key_padding_mask": None})
        return incremental, self.tokens(rows, position + 1)

    def read(self, tokens: torch.Tensor) -> DecodingState:
        """The state that a prompt pass leaves behind."""
        return self.model.decoder.stack.read(tokens)

    def step(self, incremental: dict, tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """One token for every row, as fairseq's generator makes it; returns the tokens with it."""
        if incremental:
            self.ensemble.reorder_incremental_state([incremental], order)
        log_probs, _ = self.ensemble.forward_decoder(tokens, None, [incremental])
        return torch.cat((tokens, log_probs.argmax(dim=-1, keepdim=True)), dim=1)

    def state_bytes(self, position: int, rows: int) -> int:
        """What the state takes, reckoned from a state of one row, and of few tokens or without numbers."""
        if not self.has_state:
            return rows * position * bytes_of(self.start(1, 1)[0])
        state = self._cache(position, 1, "meta") if self.grows else self._state(position, 1)
        return rows * bytes_of(state)

    def _state(self, position: int, rows: int) -> DecodingState:
        if self.grows:
            return self._cache(position, rows, self.device)
        if self._read[0] != position:
            self._read = position, self.read(self.tokens(1, position))
        return self._read[1].reorder(torch.zeros(rows, dtype=torch.long, device=self.device))

    def _cache(self, position: int, rows: int, device: str) -> DecodingState:
        """Random keys and values of ``position`` tokens."""
        state = self.model.decoder.stack.empty_state(torch.zeros(rows, 1, device=device))
        positions = torch.arange(position, device=device).expand(rows, position)

        def filled(layer: KeyValueCache) -> KeyValueCache:
            k, v = (x.new_empty(rows, position, x.shape[2]).normal_() for x in (layer.k, layer.v))
            return layer.after(k, v, positions, None)

        return DecodingState(tuple(filled(layer) for layer in state.layers))

    def check(self) -> None:
        """Refuses a model whose tokens depend on how they are computed.

        Raises:
            RuntimeError: they do.
        """
        tokens = self.tokens(2, 24 if not self.has_state else 300)
        expected = self.model(tokens)[0].float()
        incremental: dict = {}
        begin = 0
        if self.has_state:
            begin = 280  # beyond a chunk
            self.model.decoder.continue_from(incremental, self.read(tokens[:, :begin]))
        found = [
            self.model.decoder(tokens[:, begin : end + 1], incremental_state=incremental)[0][:, -1].float()
            for end in range(begin, tokens.shape[1])
        ]
        error = (torch.stack(found, dim=1) - expected[:, begin:]).abs().max() / expected.abs().max()
        allowed = TOLERANCE if self.dtype == torch.float32 else 5e-2
        if not error <= allowed:
            raise RuntimeError(f"{self.name}: token by token differs from parallel by {float(error):.1e}")


def _config(name: str, overrides: dict) -> Any:
    """The architecture's options, as far as the model has them."""
    preset = argparse.Namespace()
    if name in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[name](preset)
    cfg = MODEL_DATACLASS_REGISTRY[ARCH_MODEL_NAME_REGISTRY.get(name, name)]()
    for option, value in {**vars(preset), **overrides}.items():
        if hasattr(cfg, option):
            setattr(cfg, option, value)
    return cfg


def columns_of(contender: Contender) -> dict:
    """What a record says about the model."""
    cfg = contender.cfg
    d = getattr(cfg, "embed_dim", None) or getattr(cfg, "decoder_embed_dim", "")
    units, chunks = getattr(cfg, "block", "") == "gau", getattr(cfg, "attention", "quadratic") != "quadratic"
    return {
        "name": contender.name,
        "parameters": sum(p.numel() for p in contender.model.parameters()),
        "backend": getattr(cfg, "backend", ""),
        "d": d,
        "e": cfg.expansion_factor * d if units else "",
        "s": getattr(cfg, "attention_dim", ""),
        "c": cfg.chunk_size if chunks else "",
    }
