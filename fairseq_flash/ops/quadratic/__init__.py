"""Squared-ReLU attention over a chunk or a whole row, and the cache of a row that is read in pieces."""

from fairseq_flash.ops.quadratic.cache import NEVER, KeyValueCache
from fairseq_flash.ops.quadratic.reference import quadratic_attention, quadratic_scores

__all__ = ["NEVER", "KeyValueCache", "quadratic_attention", "quadratic_scores"]
