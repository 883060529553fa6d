"""The card of an exported model: what it is, what it has read, how well it predicts, where its limits are."""

import json
import math
from pathlib import Path
from typing import Any, Optional

from fairseq import checkpoint_utils

__all__ = ["card"]

#: By whether a model is causal: what it is for, in Hugging Face's words, and the class that loads it.
KINDS = {True: ("text-generation", "CausalLM"), False: ("fill-mask", "MaskedLM")}
#: Criterions whose loss is in bits for each token that is predicted.
IN_BITS = ("cross_entropy", "masked_lm")
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [fairseq_flash]
---

# A FLASH model of {parameters:.3g} M parameters

{layers} gated attention units of {width}, {attention} attention, {words} words; weights in {dtype}.

    AutoModelFor{kind}.from_pretrained("this folder", trust_remote_code=True)

## Data

{data}

## Training and loss

{training}

## Limits

- It predicts words of text like that of its training. It follows no instructions and checks nothing.
- Nothing was filtered on the way: what the text says of people and groups, the model may say as well.
- {rows}
- The loss is of the validation text alone, and from before the weights were rounded, if they were.
- Neither source nor licence of the text is known to the program that wrote this page: please add them.
"""
LONGER = "It reads rows longer than those of its training; that text from far back helps it is not known."


def card(checkpoint: Path, data: Path, settings: dict[str, Any], parameters: int) -> str:
    """Writes the card in Markdown, with the header that Hugging Face reads.

    Args:
        checkpoint: The file, whose options and loss are told; one that was imported has none.
        data: Folder of its data, whose ``prepare.json`` is told if there is one.
        settings: The content of ``config.json``.
        parameters: Number of them, shared ones once.
    """
    task, kind = KINDS[settings["causal"]]
    record = data / "prepare.json"
    splits = json.loads(record.read_text(encoding="utf-8"))["splits"] if record.exists() else {}
    table = settings["attention"] == "quadratic" and settings["relative_bias"] == "toeplitz"
    return CARD.format(
        **{"task": task, "kind": kind, "parameters": parameters / 1e6, "dtype": settings["dtype"]},
        **{"layers": settings["num_hidden_layers"], "width": settings["hidden_size"]},
        **{"attention": settings["attention"], "words": settings["vocab_size"]},
        data=_read(splits) or "What it was trained on was not recorded beside it.",
        rows=f"It reads rows of at most {settings['n_ref']:,} tokens." if table else LONGER,
        training=_training(checkpoint, splits, settings["causal"]),
    )


def _read(splits: dict[str, dict[str, int]]) -> str:
    counts = ("documents", "tokens", "bytes")
    told = {
        name: ", ".join(f"{split[count]:,} {count}" for count in counts if count in split)
        for name, split in splits.items()
    }
    return "\n".join(f"- {name}: {told[name]}" for name in told if told[name])


def _training(checkpoint: Path, splits: dict[str, dict[str, int]], causal: bool) -> str:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    updates, cfg = state["optimizer_history"][-1]["num_updates"], state["cfg"]
    if not updates:
        return "How it was trained is not in the checkpoint, which was imported."
    optimization, dataset = cfg["optimization"], cfg["dataset"]
    parts = optimization["update_freq"][0]
    sizes = {"tokens": dataset["max_tokens"], "rows": dataset["batch_size"]}
    most = " and ".join(f"{size:,} {unit}" for unit, size in sizes.items() if size)
    processes = cfg["distributed_training"]["distributed_world_size"]
    told = [
        f"- {updates:,} updates, each of {parts} x {processes} batches of at most {most}",
        f"- {cfg['optimizer']['_name']}, rate {optimization['lr'][0]:g}, {cfg['lr_scheduler']['_name']}",
        f"- rows of {cfg['task']['tokens_per_sample']:,} tokens",
        *_spent(state["extra_state"], splits.get(dataset["train_subset"], {}).get("tokens")),
    ]
    loss, metric = state["extra_state"].get("val_loss"), cfg["checkpoint"]["best_checkpoint_metric"]
    criterion, steps = cfg["criterion"], dataset["max_valid_steps"]
    # That of --sentence-avg is of a row.
    in_bits = criterion["_name"] in IN_BITS and not criterion.get("sentence_avg")
    if loss is None or metric != "loss" or not in_bits:
        return "\n".join([*told, "- its loss was not recorded"])
    unit = "token" if causal else "masked token"
    line = f"- validation loss: {loss * math.log(2):.4g} nats a {unit}, perplexity {2**loss:.4g}"
    # fairseq's loss is of the first subset.
    valid = splits.get(dataset["valid_subset"].split(",")[0], {})
    if steps is not None:
        # fairseq reads one more than it is told, in each process.
        line += f", of the first {(steps + 1) * processes:,} batches at most"
    elif causal and valid.get("bytes"):
        line += f", {loss * valid['tokens'] / valid['bytes']:.4g} bits a byte"
    return "\n".join([*told, line])


def _spent(recorded: dict[str, Any], length: Optional[int]) -> list[str]:
    """Tokens and time of a training on a text of so many tokens, as far as they are recorded."""
    meters = {name: meter for _, name, _, meter in recorded.get("metrics", {}).get("default", ())}
    # Words per batch, whose meter keeps the sum over all updates.
    told, tokens = [], int(meters.get("wpb", {}).get("sum") or 0)
    if tokens:
        times = f", {tokens / length:.2g} times the text" if length else ""
        told.append(f"- {tokens:,} tokens in all{times}")
    if seconds := recorded.get("previous_training_time"):
        told.append(f"- {seconds / 60:.2g} minutes, with validation and what was compiled")
    return told
