"""A trained model from its files, and what tells it from another."""

import hashlib
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary

from fairseq_flash.models.flash_lm import FlashLanguageModel
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM

__all__ = ["find_checkpoint", "fingerprint", "load_model"]

NAMES = ("checkpoint_best.pt", "checkpoint_last.pt")
NAMES_OF_MODELS = {FlashLanguageModel: "flash_lm", FlashMaskedLM: "flash_masked_lm"}
#: In a state dict, what a model remembers of its training; states saved without it fit as well.
RECORD = "_extra_state"


def load_model(
    checkpoint: Path, data: Optional[Path], kinds: tuple[type, ...] = (FlashLanguageModel,)
) -> tuple[Any, Any, Path]:
    """Loads a model, by default a language model.

    Args:
        checkpoint: A file, or a folder with ``checkpoint_best.pt`` or ``checkpoint_last.pt``.
        data: Folder of the dictionary; that of the checkpoint by default.
        kinds: Classes that the model may be of.

    Returns:
        The model in evaluation mode, its task, and the folder of its dictionary.

    Raises:
        ValueError: something is missing or cannot be read, or the model is none of ours.
    """
    checkpoint = find_checkpoint(checkpoint)
    data = data or checkpoint.parent
    if not (data / "dict.txt").exists():
        raise ValueError(f"{data} holds no dict.txt; --data names the folder that the model was trained on")
    try:
        loaded = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data)})
    except Exception as error:  # of many kinds: files, configurations, weights
        said = " ".join(str(error).split()) or type(error).__name__
        named = said if str(checkpoint) in said else f"{checkpoint} cannot be loaded with {data}: {said}"
        raise ValueError(named) from None
    (model,), _, task = loaded
    if not isinstance(model, kinds):
        allowed = " or ".join(NAMES_OF_MODELS[kind] for kind in kinds)
        raise ValueError(f"{checkpoint} holds a {type(model).__name__}; allowed: models such as {allowed}")
    return model.eval(), task, data


def find_checkpoint(place: Path) -> Path:
    """The checkpoint of a folder, or the file itself.

    Raises:
        ValueError: there is none.
    """
    if not place.exists():
        raise ValueError(f"{place} does not exist")
    if not place.is_dir():
        return place
    found = [place / name for name in NAMES if (place / name).exists()]
    if not found:
        raise ValueError(f"{place} holds neither {NAMES[0]} nor {NAMES[1]}")
    return found[0]


def fingerprint(model: torch.nn.Module, dictionary: Dictionary) -> str:
    """A digest of the weights and the dictionary."""
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(RECORD):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
