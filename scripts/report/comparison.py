"""The report of a comparison as one HTML file, or as Markdown with its figures beside it."""

import base64
import logging
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from tabulate import tabulate

from report.answer import LOSS, RIVALS, Measure, answer, best_rate, by_length
from report.markdown import escaped, folded, page, table

__all__ = ["Comparison", "by_name", "check_path", "summary", "verdict", "write"]

TITLE = "Language models compared"
ABOUT = """Loss is in nats per token on what was evaluated of the validation split (see "tokens evaluated"):
the mean over seeds, with the lowest and the highest in brackets. "tie": the ranges over seeds overlap. "one
seed": what a difference is worth cannot be told from one seed. Bold: the best loss, and what ties with it.
Speed is that of training, the median over the run; with several runs at a time (jobs), speeds cannot be
compared. transformer_lm is fairseq's own, with its norms before the layers; all options are in the commands
below."""
FIGURES = {
    "quality": "Loss against training speed: down and right is better",
    "tokens": "Loss against tokens (during training, validation is on the first tokens of the split)",
    "seconds": "Loss against seconds of training",
    "ablation": "Difference in loss",
}


class Comparison(NamedTuple):
    """What a report tells.

    Attributes:
        settings: What all runs share, by name.
        records: One for each run, as in the CSV; those that failed among them.
        rates: One for each run that only tried a learning rate.
        curves: Loss curves of the runs, as in the CSV.
        commands: Shell commands that made all this, in order.
        valid_tokens: Of the whole split; None where that is not known.
        measure: What the systems are compared by.
    """

    settings: dict[str, str]
    records: list[dict[str, str]]
    rates: list[dict[str, str]]
    curves: list[dict[str, str]]
    commands: list[str]
    valid_tokens: Optional[int] = None
    measure: Measure = LOSS


def check_path(path: Optional[Path]) -> None:
    """Refuses a report of an unknown kind.

    Raises:
        ValueError: it is.
    """
    if path is not None and path.suffix not in (".html", ".md"):
        raise ValueError(f"--report {path} is not allowed; allowed: a name that ends in .html or .md")


def verdict(own: list[float], other: list[float], measure: Measure = LOSS) -> str:
    """How losses compare with those of another system; each list holds one loss a seed."""
    difference = statistics.mean(own) - statistics.mean(other)
    if max(min(own), min(other)) <= min(max(own), max(other)):
        return f"tie ({difference:+.{measure.digits}f})"
    single = " (one seed)" if min(len(own), len(other)) == 1 else ""
    word = "better" if (difference > 0) == measure.higher else "worse"
    return f"{word} by {abs(difference):.{measure.digits}f}{single}"


def write(path: Path, comparison: Comparison) -> list[Path]:
    """Writes the report.

    Args:
        path: Ends in ``.html`` or ``.md``.
        comparison: What to tell.

    Returns:
        Every file that was written, ``path`` first.

    Raises:
        ValueError: the name ends otherwise.
    """
    check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images, sources = {}, {}
    for name, drawn in figures(comparison).items():
        sources[name] = [
            f"{path.stem}_{name}{f'_{k}' if k > 1 else ''}.png" for k in range(1, len(drawn) + 1)
        ]
        images |= dict(zip(sources[name], drawn, strict=True))
    text = "\n\n".join(blocks(comparison, sources)) + "\n"
    if path.suffix == ".html":
        encoded = {source: base64.b64encode(data).decode() for source, data in images.items()}
        urls = {source: f"data:image/png;base64,{code}" for source, code in encoded.items()}
        text = page(TITLE, text, urls)
        images = {}
    path.write_text(text, encoding="utf-8")
    for source, data in images.items():
        path.with_name(source).write_bytes(data)
    return [path, *(path.with_name(source) for source in images)]


def summary(comparison: Comparison) -> str:
    """What a terminal shows: a table for each length, and the answer."""
    told = []
    for n, records in by_length(succeeded(comparison.records)).items():
        header, lines = loss_table(records, comparison)
        shown = [place for place in (0, 2, 3, 5, 6, 7, 12, 13) if any(line[place] for line in lines)]
        lines = [[line[place].replace("**", "") for place in shown] for line in lines]
        words = tabulate(lines, [header[place] for place in shown], disable_numparse=True)
        told.append(f"{n} tokens a row\n{words}" if n else words)
    return "\n\n".join([*told, answered(comparison)])


def answered(comparison: Comparison) -> str:
    """The answer in one sentence."""
    part = comparison.settings.get("evaluated", "what was evaluated of the split valid")
    found = column(succeeded(comparison.records), "valid_tokens")
    share = f" ({min(found):,.0f} tokens)" if found else ""
    if lost := failures(comparison.records):
        names = ", ".join(by_name(lost))
        share += f", without {len(lost)} of {len(comparison.records)} runs, which failed ({names})"
    return answer(succeeded(comparison.records), comparison.rates, f"{part}{share}", comparison.measure)


def figures(comparison: Comparison) -> dict[str, list[bytes]]:
    """The pages of each figure as PNG, by its name; none without matplotlib or a run that succeeded."""
    records = succeeded(comparison.records)
    # Where fairseq is imported, everyone's debugging is on.
    for library in ("matplotlib", "PIL", "MARKDOWN"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        from report import figures as drawn
    except ImportError:
        print('the report has no figures: they need matplotlib and pandas (pip install -e ".[plot]")')
        return {}
    images = {}
    for name in FIGURES if records else ():
        data = comparison.curves if drawn.FIGURES[name].csv.endswith("_curves.csv") else records
        if data:
            images[name] = [drawn.png(figure) for figure in drawn.pages(name, drawn.frame(data))]
    return images


def blocks(comparison: Comparison, sources: dict[str, list[str]]) -> Iterator[str]:
    """The parts of the page in Markdown, in order; ``sources`` are the files of each figure by its name."""
    records = succeeded(comparison.records)
    yield f"# {TITLE}"
    yield f"**{escaped(answered(comparison))}**"
    for n, own in by_length(records).items():
        yield f"## {n} tokens a row"
        yield table(*loss_table(own, comparison))
    if failed := failures(comparison.records):
        yield "## Runs that failed"
        columns = ["name", "n", "seed", "status"]
        told = [{**record, "status": why_failed(record)} for record in failed]
        lines = [[escaped(record[column]) for column in columns] for record in told]
        yield table(["system", *columns[1:]], lines)
    for name, (first, *more) in sources.items():
        yield f"![{FIGURES[name]}]({first})\n\n{FIGURES[name]}."
        if more:
            yield folded(f"more of this ({len(more)})", more)
    if comparison.rates:
        yield "## Learning rates that were tried"
        yield table(*rate_table(comparison.rates))
    yield "## How to read this"
    yield ABOUT
    yield "## Settings"
    yield table(["", ""], [[escaped(name), escaped(value)] for name, value in comparison.settings.items()])
    yield "## Commands"
    yield "\n".join(f"    {line}" for command in comparison.commands for line in command.split("\n"))


def succeeded(records: list[dict]) -> list[dict]:
    """Records with a finite loss."""
    return [record for record in records if not why_failed(record)]


def failures(records: list[dict]) -> list[dict]:
    """The other records."""
    return [record for record in records if why_failed(record)]


def why_failed(record: dict) -> str:
    """Empty for a record with a finite loss."""
    if record["status"] != "ok":
        return record["status"] or "no status"
    loss = record["valid_loss"] or "nan"
    return "" if math.isfinite(float(loss)) else f"the loss is {loss}"


def by_name(records: Iterable[dict]) -> dict[str, list[dict]]:
    """Records of each system."""
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(record["name"], []).append(record)
    return found


def loss_table(records: list[dict], comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and lines for records of one length: the best system first."""
    systems, measure, whole = by_name(records), comparison.measure, comparison.valid_tokens
    losses = {name: column(own, measure.column) for name, own in systems.items()}
    base = next((name for name in RIVALS if name in systems), next(iter(systems)))
    order = sorted(systems, key=lambda name: statistics.mean(losses[name]), reverse=measure.higher)
    header = [
        *("system", "parameters", "rate", "seeds", "train loss", measure.title, f"against {base}"),
        "perplexity",
        *("tokens evaluated", "bits per byte", "per byte", "per word", "tokens/s", "seconds", "peak memory"),
    ]
    lines = []
    for name in order:
        own = systems[name]
        ties = name == order[0] or verdict(losses[name], losses[order[0]], measure).startswith("tie")
        line = [
            escaped(name),
            parameters(own, systems[base]),
            own[0]["lr"],
            str(len(own)),
            average(own, "train_loss", 3),
        ]
        line += [
            emphasis(spread(losses[name], measure.digits), ties),
            "" if name == base else verdict(losses[name], losses[base], measure),
        ]
        line += [average(own, "valid_perplexity", 2), part(own, whole), average(own, "bits_per_byte", 4)]
        line += [average(own, "byte_perplexity", 3), average(own, "word_perplexity", 1)]
        line += [average(own, "tokens_per_second", 0), average(own, "seconds", 0), memory(own)]
        lines.append(line)
    return header, lines


def rate_table(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for the rates that were tried: a loss for each system and rate."""
    tried = sorted({record["lr"] for record in records}, key=float)
    lines = []
    for name, own in by_name(records).items():
        losses = {
            record["lr"]: record["valid_loss"] if record["status"] == "ok" else "failed" for record in own
        }
        best, edge = best_rate(own)
        cells = [emphasis(losses.get(rate, ""), rate == best) for rate in tried]
        lines.append([escaped(name), *cells, "at the edge of what was tried" if edge else ""])
    return ["system", *tried, ""], lines


def column(records: list[dict], name: str) -> list[float]:
    """The numbers of a column, as far as they are there."""
    return [float(record[name]) for record in records if record.get(name) not in ("", None)]


def average(records: list[dict], name: str, digits: int) -> str:
    """The mean of a column."""
    found = column(records, name)
    return f"{statistics.mean(found):,.{digits}f}" if found else ""


def part(records: list[dict], whole: Optional[int]) -> str:
    """How many tokens the loss is of, and what part of the split that is where its size is known."""
    found = column(records, "valid_tokens")
    if not found:
        return ""
    share = f" ({100 * min(found) / whole:.3g} %)" if whole else ""
    return f"{min(found):,.0f}{share}"


def spread(losses: list[float], digits: int) -> str:
    """Mean and range."""
    reach = f" ({min(losses):.{digits}f} to {max(losses):.{digits}f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.{digits}f}{reach}"


def parameters(records: list[dict], base: list[dict]) -> str:
    """Number of parameters, and how it differs from the baseline's."""
    own, others = (float(each[0]["parameters"]) for each in (records, base))
    difference = f" ({100 * (own / others - 1):+.1f} %)" if records is not base else ""
    return f"{own / 1e6:.2f} M{difference}"


def memory(records: list[dict]) -> str:
    """The highest peak of all runs."""
    found = column(records, "peak_memory")
    return f"{max(found) / 2**30:.2f} GiB" if found else ""


def emphasis(text: str, strong: bool) -> str:
    """Marked as the best."""
    return f"**{text}**" if strong and text else text
