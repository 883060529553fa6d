"""Writes docs/options.md: every option of the models from the code, and every architecture's values.

    python scripts/write_options.py

Run it again after an option or an architecture changed (a test compares the page with what it would write).
"""

import dataclasses
from pathlib import Path
from typing import Any, Optional

from fairseq_flash.models import flash_lm, flash_masked_lm, flash_seq2seq
from fairseq_flash.models._options import FlashConfig, UnitConfig
from runs.command_line import command_line

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
MODELS = {
    "flash_lm": (flash_lm.FlashLanguageModelConfig, flash_lm.PRESETS),
    "flash_masked_lm": (flash_masked_lm.FlashMaskedLMConfig, flash_masked_lm.PRESETS),
    "flash_seq2seq": (flash_seq2seq.FlashSeq2SeqConfig, flash_seq2seq.PRESETS),
}
#: Each part of the page: its title, and the class whose own options stand there.
PARTS = {
    "Of all models": UnitConfig,
    "Of language models and masked models": FlashConfig,
    "Of language models": flash_lm.FlashLanguageModelConfig,
    "Of masked models": flash_masked_lm.FlashMaskedLMConfig,
    "Of translation": flash_seq2seq.FlashSeq2SeqConfig,
}
HEAD = """\
# Options

Written by `scripts/write_options.py` from the code. fairseq's own options (`fairseq-train --help`) are there
as well; what `transformer_lm` calls otherwise is in [from-transformer_lm.md](from-transformer_lm.md).
An architecture has values of its own in place of some defaults: the last tables. In a hydra file,
`--embed-dim` is `model.embed_dim`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, config in PARTS.items():
        own = [field for field in dataclasses.fields(config) if _is_own(config, field)]
        rows = [
            (f"`{_word(field.name)}`", _default(field), _choices(field), field.metadata["help"])
            for field in own
        ]
        parts.append(f"## {title}\n\n{_table(('option', 'default', 'allowed', 'what it is'), rows)}\n")
    for model, (config, presets) in MODELS.items():
        names = sorted({name for preset in presets.values() for name in preset}, key=_order(config))
        rows = [
            (f"`{arch}`", *(_value(preset.get(name, getattr(config, name))) for name in names))
            for arch, preset in {model: presets.get(model, {}), **presets}.items()
        ]
        header = ("`--arch`", *(f"`{_word(name)}`" for name in names))
        parts.append(f"## Architectures of {model}\n\n{_table(header, rows)}\n")
    return "\n".join(parts)


def _is_own(config: type, field: dataclasses.Field) -> bool:
    """Whether the class brings the option, or another default of one."""
    parent = {one.name: one for one in dataclasses.fields(config.__mro__[1])}.get(field.name)
    return field.name != "_name" and (parent is None or parent.default != field.default)


def _order(config: type) -> Any:
    return [field.name for field in dataclasses.fields(config)].index


def _word(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default(field: dataclasses.Field) -> str:
    return "none" if field.default is None else _value(field.default)


def _choices(field: dataclasses.Field) -> str:
    kind = str(field.type)
    choices = getattr(field.type, "__args__", [field.type])[0]
    if hasattr(choices, "__members__"):
        return ", ".join(f"`{choice.value}`" for choice in choices)
    return next((word for word in ("bool", "int", "float", "str") if word in kind), "").replace("bool", "")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else str(getattr(value, "value", value))


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Optional[list[str]] = None) -> None:
    """Writes it."""
    command_line(__doc__, "write_options.py").parse_args(arguments)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
