"""What lies between the dense layers and the attention: SiLU and split, offset-scale, rotary."""

from fairseq_flash.ops.projections.reference import offset_scale, rotated_copies, shifted, split_silu

__all__ = ["offset_scale", "rotated_copies", "shifted", "split_silu"]
