"""The hub: archives are unpacked without harm, and a checkpoint opens no address of its own."""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import lzma
import numbers
import os
import pathlib
import platform
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Optional

import omegaconf
import torch

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]

#: What an archive may unpack to: so many bytes a byte of it, and so many more.
_GROWTH, _ALLOWANCE = 20, 2**26


def prepare() -> None:
    """Applies every healing of this file."""
    _unpack_without_harm()
    _open_no_address_of_a_checkpoint()
    _look_at_what_is_asked()


def _unpack_without_harm() -> None:
    """Unpacks ``from_pretrained("model.tar.gz")`` into a folder of its own; any version.

    fairseq unpacks without a filter, so that an archive writes any file of the user's, and puts the folder in
    the place of the archive. Here members are files and folders below the archive's own only, they go to
    fairseq's cache under the digest of the archive, and the archive stays.
    """
    from fairseq import file_utils

    def heal(load: Callable) -> Callable:
        def healed(archive_file: Any) -> str:
            try:
                path = file_utils.cached_path(archive_file)
            except OSError:
                raise FileNotFoundError(
                    f"{str(archive_file)!r} does not exist; allowed: a folder, a tar archive or its address"
                ) from None
            return str(path) if os.path.isdir(path) else _unpacked(str(path), file_utils)

        return healed

    wrap(file_utils, "load_archive_file", heal)


def _unpacked(path: str, file_utils: Any) -> str:
    """The folder that an archive's content lies in, unpacked now or before."""
    with open(path, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    target = pathlib.Path(file_utils.PYTORCH_FAIRSEQ_CACHE, "unpacked", name)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _unpack(path, f"{scratch}/content")
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.rename(f"{scratch}/content", target)
    inside = list(target.iterdir())
    return str(inside[0] if len(inside) == 1 and inside[0].is_dir() else target)


def _unpack(path: str, folder: str) -> None:
    try:
        with tarfile.open(path) as archive:
            room = _GROWTH * os.path.getsize(path) + _ALLOWANCE
            for member in archive:
                room -= member.size
                problem = "it unpacks to far more than it has bytes" if room < 0 else _problem_of(member)
                if problem:
                    raise ValueError(f"{path!r} was refused and nothing of it unpacked: {problem}")
            if not hasattr(tarfile, "data_filter"):
                raise ValueError(
                    f"{path!r} was refused: Python {platform.python_version()} cannot look at what it "
                    "unpacks; allowed: Python 3.11.4 or newer, or a folder"
                )
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        said = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{path!r} is neither a folder nor a whole tar archive: {said}") from None


def _problem_of(member: tarfile.TarInfo) -> Optional[str]:
    """What Python's own filter refuses as well, but some versions can be led past it by links."""
    parts = pathlib.PurePosixPath(member.name).parts
    if not member.isreg() and not member.isdir():
        return f"{member.name!r} is neither a file nor a folder"
    if member.name.startswith("/") or ".." in parts or len(member.name) > 4096:
        return f"{member.name[:200]!r} lies outside of its folder"
    return None


def _open_no_address_of_a_checkpoint() -> None:
    """Refuses a checkpoint whose own ``bpe`` or ``tokenizer`` is fetched from the network; any version.

    The hub builds both from the checkpoint's configuration: whoever wrote the file would learn who loads it,
    and give them another file. What the caller names is the caller's wish, and fetched as before.
    """
    from fairseq import hub_utils

    def heal(load: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> dict[str, Any]:
            loaded = load(*args, **kwargs)
            for kind in ("tokenizer", "bpe"):
                wished = {value for value in kwargs.values() if isinstance(value, str)}
                wished |= set(_strings(kwargs.get(kind), kind))
                for option, value in _options(loaded["args"].get(kind), kind):
                    if value not in wished and ("://" in value or value == "bert"):
                        raise ValueError(
                            f"the checkpoint's own {kind} would fetch {value!r} ({option}); allowed: "
                            f"{option}=FILE, or {kind}=None where words are tokens"
                        )
            return loaded

        return healed

    wrap(hub_utils, "from_pretrained", heal)


def _look_at_what_is_asked() -> None:
    """Refuses what is no text, no row of tokens or no option of generation; fairseq 0.12 does not look.

    Of a text without a word fairseq's score is NaN, the mean of nothing.
    """
    from fairseq.dataclass.configs import GenerationConfig
    from fairseq.hub_utils import GeneratorHubInterface
    from fairseq.models import FairseqEncoderDecoderModel

    types = {field.name: field.type for field in dataclasses.fields(GenerationConfig)}

    def heal_texts(use: Callable) -> Callable:
        def healed(self, sentences: Any, *args: Any, **kwargs: Any) -> Any:
            texts = sentences if isinstance(sentences, str) else _listed(sentences)
            if not isinstance(texts, str) and not (texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(
                    f"sentences={sentences!r} is not allowed; allowed: a text, or a list of texts"
                )
            return use(self, texts, *args, **kwargs)

        return healed

    def heal_score(score: Callable) -> Callable:
        def healed(self, sentences: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(model, FairseqEncoderDecoderModel) for model in self.models):
                name = getattr(self.cfg.task, "_name", type(self.task).__name__)
                raise ValueError(f"score() is not allowed with --task {name}; allowed: with a language model")
            if any(not text.strip() for text in ([sentences] if isinstance(sentences, str) else sentences)):
                raise ValueError(f"sentences={sentences!r} has a text without a word, which has no score")
            return score(self, sentences, *args, **kwargs)

        return healed

    def heal_generate(generate: Callable) -> Callable:
        signature = inspect.signature(generate)

        def healed(self, *args: Any, **kwargs: Any) -> Any:
            known = {*signature.parameters, *types}
            for name in kwargs.keys() - known - {*self.cfg.generation}:
                near = ", ".join(difflib.get_close_matches(name, known)) or "options of fairseq-generate"
                raise ValueError(f"{name}={kwargs[name]!r} is unknown; allowed: {near}")
            asked = signature.bind(self, *args, **kwargs).arguments
            _check_types({"beam": asked.get("beam", 5), **kwargs}, types)
            _check_rows(asked["tokenized_sentences"], self.src_dict, kwargs.get("score_reference", False))
            return generate(self, *args, **kwargs)

        return healed

    wrap(GeneratorHubInterface, "score", heal_score)
    for name in ("sample", "score"):
        wrap(GeneratorHubInterface, name, heal_texts)
    wrap(GeneratorHubInterface, "generate", heal_generate)


#: What an option may be, in words, by its type.
_TYPES = {
    bool: ("True or False", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
}


def _check_types(options: dict[str, Any], types: dict[str, Any]) -> None:
    for name, value in options.items():
        text, allowed = _TYPES.get(types.get(name), ("", object))
        if not isinstance(value, allowed) or (isinstance(value, bool) and allowed not in (bool, object)):
            raise ValueError(f"{name}={value!r} is not allowed; allowed: {text}")


def _check_rows(rows: Any, dictionary: Any, scored: bool) -> None:
    """Of tokens: a tensor of a row or of several, or a list of rows."""
    if isinstance(rows, torch.Tensor) and rows.dim() < 2:
        rows = [rows]
    elif not isinstance(rows, (torch.Tensor, list, tuple)):
        rows = []
    for row in rows:
        whole = isinstance(row, torch.Tensor) and row.dim() == 1 and row.dtype in (torch.int64, torch.int32)
        if not whole or (row.numel() and not 0 <= int(row.min()) <= int(row.max()) < len(dictionary)):
            break
        if scored and not row.ne(dictionary.eos()).any():
            raise ValueError("tokenized_sentences has a row without a word, which has no score")
    else:
        if len(rows):
            return
    raise ValueError(
        f"tokenized_sentences is no row; allowed: one or more tensors (n,) of {len(dictionary)} words' "
        "indices, as encode() gives them"
    )


def _listed(several: Any) -> list[Any]:
    """The items of a list, an array or a generator; none of what has no items."""
    try:
        items = iter(several)
    except TypeError:
        return []
    return list(items)


def _strings(chosen: Any, kind: str) -> Iterator[str]:
    return (value for _, value in _options(chosen, kind))


def _options(chosen: Any, kind: str) -> Iterator[tuple[str, str]]:
    """Names and strings of a configuration, with those that the chosen class adds."""
    from fairseq.registry import REGISTRIES

    given = chosen if isinstance(chosen, str) else _plain(chosen)
    name = given if isinstance(given, str) else given.get("_name", given.get(kind))
    defaults = REGISTRIES[kind]["dataclass_registry"].get(name)
    values = {} if defaults is None else _plain(omegaconf.OmegaConf.structured(defaults))
    values.update({"_name": name} if isinstance(given, str) else given)
    return ((option, value) for option, value in values.items() if isinstance(value, str))


def _plain(chosen: Optional[Any]) -> dict[str, Any]:
    if chosen is None:
        return {}
    if omegaconf.OmegaConf.is_config(chosen):
        return omegaconf.OmegaConf.to_container(chosen)
    return dict(chosen) if isinstance(chosen, dict) else dict(vars(chosen))
