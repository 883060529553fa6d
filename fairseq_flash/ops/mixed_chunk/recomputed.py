"""The fast path in PyTorch: keeps pre-activations and what is dear, and computes the rest again.

For the backward pass it keeps ``uvz``, the output before the gate (``c + s`` multiply-adds a number) and the
sums that each chunk reads (``c`` multiply-adds a number): ``3e + s + s e / c`` numbers a token. Autograd on the
reference keeps ``8e`` and more: both sides of every SiLU, product and sum. SiLU, the rotated copies and the
scores are computed again.

Both branches are one product, ``[q_lin | A] [S ; v]``, in blocks of queries that leave out the keys above the
diagonal; nobody sums the last chunk of a causal row.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fairseq_flash.ops.linear import exclusive_sum
from fairseq_flash.ops.mixed_chunk.gated import Carry, Options, Projected
from fairseq_flash.ops.mixed_chunk.reference import summed_denominator
from fairseq_flash.ops.projections import rotated_copies

__all__ = ["objections", "run"]

#: Queries in a block: the smaller, the less is computed above the diagonal, and the slower each product.
BLOCK = 128
