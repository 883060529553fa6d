"""A checkpoint as a folder that transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from safetensors.torch import save_file

from fairseq_flash.export.card import card
from fairseq_flash.export.names import CLASSES, FILES, MODEL_TYPE, PREFIXES, TIED, settings_of
from fairseq_flash.generation.model import find_checkpoint, load_model
from fairseq_flash.models.flash_lm import FlashLanguageModel

__all__ = ["export_checkpoint"]

HERE = Path(__file__).parent
CODE = ("modeling_flash.py", "tokenization_flash.py")


def export_checkpoint(
    checkpoint: Path, folder: Path, data: Optional[Path] = None, dtype: Optional[torch.dtype] = None
) -> None:
    """Writes a model for ``AutoModelForCausalLM``, or ``AutoModelForMaskedLM``, and its tokenizer.

    The folder gets ``config.json``, ``generation_config.json``, ``model.safetensors``, the code that computes
    the model, the tokenizer's files, and a card in ``README.md``; all that is needed with neither fairseq nor
    fairseq_flash.

    Args:
        checkpoint: A file, or a folder with ``checkpoint_best.pt`` or ``checkpoint_last.pt``.
        folder: New, or empty.
        data: Folder of ``dict.txt`` and, if pieces are tokens, ``sentencepiece.bpe.model``; that of the
            checkpoint by default.
        dtype: What the weights are rounded to; they stay as they are by default.

    Raises:
        ValueError: the checkpoint cannot be read, the model has an option that the code there does not
            compute, or the folder holds files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds files already; allowed: a new or an empty folder")
    checkpoint = find_checkpoint(checkpoint)
    model, task, data = load_model(checkpoint, data, tuple(CLASSES))
    settings = _config(model, task, dtype)
    weights = _weights(model, settings, dtype)
    about = card(checkpoint, data, settings, sum(weight.numel() for weight in weights.values()))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(about, encoding="utf-8")
    special = {f"{name}_token_id": settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    _write(folder / "config.json", settings)
    # As fairseq, which never writes padding.
    _write(folder / "generation_config.json", dict(special, suppress_tokens=[settings["pad_token_id"]]))
    _write(folder / "tokenizer_config.json", _tokenizer(task.source_dictionary, settings))
    for path in (*(HERE / name for name in CODE), *(data / name for name in FILES)):
        if path.exists():
            shutil.copyfile(path, folder / path.name)


def _config(model: torch.nn.Module, task: Any, dtype: Optional[torch.dtype]) -> dict[str, Any]:
    dictionary, kind = task.source_dictionary, type(model)
    causal = kind is FlashLanguageModel
    if causal and len(task.target_dictionary) != len(dictionary):
        raise ValueError(
            "a model of --output-dictionary-size cannot be exported; allowed: one that predicts all words"
        )
    stack = (model.decoder if causal else model.encoder).stack
    settings = dict(settings_of(model.trained_with), dropout=stack.dropout.p)
    if settings["attention"] == "quadratic" and (causal or settings["relative_bias"] == "toeplitz"):
        settings["n_ref"] = stack.blocks[0].n_ref
    bos = causal and not getattr(task.args, "add_bos_token", False)
    name = CLASSES[kind]
    return dict(
        settings,
        model_type=MODEL_TYPE,
        architectures=[name],
        auto_map={
            "AutoConfig": "modeling_flash.FlashConfig",
            "AutoModel": "modeling_flash.FlashModel",
            f"AutoModelFor{name.removeprefix('FlashFor')}": f"modeling_flash.{name}",
        },
        causal=causal,
        vocab_size=len(dictionary),
        bos_token_id=dictionary.eos() if bos else dictionary.bos(),
        eos_token_id=dictionary.eos(),
        pad_token_id=dictionary.pad(),
        dtype=str(dtype or stack.embed_tokens.weight.dtype).removeprefix("torch."),
    )


def _weights(
    model: torch.nn.Module, settings: dict[str, Any], dtype: Optional[torch.dtype]
) -> dict[str, torch.Tensor]:
    """The parameters by their names in transformers; a shared one once."""
    found = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        here = next(prefix for prefix in PREFIXES[type(model)] if name.startswith(prefix))
        found[PREFIXES[type(model)][here] + name.removeprefix(here)] = weight.detach().to(dtype).contiguous()
    if settings["tie_word_embeddings"]:
        del found[TIED[0]]
    return found


def _tokenizer(dictionary: Dictionary, settings: dict[str, Any]) -> dict[str, Any]:
    special = {name: dictionary[settings[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    tokens = {f"{name}_token": symbol for name, symbol in special.items()}
    if not settings["causal"]:
        tokens["mask_token"] = "<mask>"
    return dict(
        tokens,
        unk_token="<unk>",
        tokenizer_class="FlashTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_flash.FlashTokenizer", None]},
        clean_up_tokenization_spaces=False,
        # So that generation goes on behind the text.
        padding_side="left" if settings["causal"] else "right",
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
