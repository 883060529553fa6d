"""What all recordings of a model as CUDA graphs have alike."""

from __future__ import annotations

import torch

__all__ = ["Graphs"]


class Graphs:
    """Recordings of a model: they belong to it as it is, and a copy of it, or a saved one, records anew."""

    def __deepcopy__(self, memo: dict) -> Graphs:
        """None of these recordings."""
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()

    @staticmethod
    def objections_to(tokens: torch.Tensor) -> list[str]:
        """Why nothing can be recorded on the device of these tokens; nothing if it can."""
        if not tokens.is_cuda:
            return [f"tokens are on {tokens.device.type}, not on a CUDA device"]
        if tokens.device.index != torch.cuda.current_device():
            return [f"tokens are on {tokens.device}, which is not the current device"]
        return []
