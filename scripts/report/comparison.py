"""The report of a comparison as one HTML file, or as Markdown with its figures beside it."""

import base64
import html
import io
import logging
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from runs.systems import BASELINE

__all__ = ["Comparison", "check_path", "verdict", "write"]

TITLE = "Language models compared"
ABOUT = """Loss is in nats per token on the validation split: the mean over seeds, with the lowest and the
highest in brackets. "tie": the ranges over seeds overlap. "one seed": what a difference is worth cannot be
told from one seed. Bold: the best loss, and what ties with it. Speed is that of training, the median over the
run; with several runs at a time (jobs), speeds cannot be compared. transformer_lm is fairseq's own, with its
norms before the layers; all options are in the commands below."""
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
        rows: One for each run, as in the CSV; those that failed among them.
        rates: One for each run that only tried a learning rate.
        curves: Loss curves of the runs, as in the CSV.
        commands: Shell commands that made all this, in order.
    """

    settings: dict[str, str]
    rows: list[dict[str, str]]
    rates: list[dict[str, str]]
    curves: list[dict[str, str]]
    commands: list[str]


def check_path(path: Optional[Path]) -> None:
    """Refuses a report of an unknown kind.

    Raises:
        ValueError: it is.
    """
    if path is not None and path.suffix not in (".html", ".md"):
        raise ValueError(f"--report {path} is not allowed; allowed: a name that ends in .html or .md")


def verdict(own: list[float], other: list[float]) -> str:
    """How losses compare with those of another system; each list holds one loss a seed."""
    difference = statistics.mean(own) - statistics.mean(other)
    if max(min(own), min(other)) <= min(max(own), max(other)):
        return f"tie ({difference:+.3f})"
    single = " (one seed)" if min(len(own), len(other)) == 1 else ""
    return f"{'better' if difference < 0 else 'worse'} by {abs(difference):.3f}{single}"


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
    images = figures(comparison)
    written = [path]
    if path.suffix == ".html":
        render = Html()
        sources = {
            name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in images.items()
        }
    else:
        render, sources = Markdown(), {}
        for name, data in images.items():
            image = path.with_name(f"{path.stem}_{name}.png")
            image.write_bytes(data)
            sources[name] = image.name
            written.append(image)
    path.write_text(render.page(blocks(comparison, render, sources)), encoding="utf-8")
    return written


def figures(comparison: Comparison) -> dict[str, bytes]:
    """The figures as PNG, by name; none where matplotlib is not installed or no run succeeded."""
    rows = succeeded(comparison.rows)
    # Where fairseq is imported, everyone's debugging is on.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        from report import figures as drawn
    except ImportError:
        print('the report has no figures: they need matplotlib (pip install -e ".[plot]")')
        return {}
    images = {}
    for name in FIGURES if rows else ():
        source = drawn.FIGURES[name]
        data = comparison.curves if source.csv.endswith("_curves.csv") else rows
        if data:
            stream, figure = io.BytesIO(), source.draw(data)
            figure.savefig(stream, dpi=110, format="png")
            drawn.plt.close(figure)
            images[name] = stream.getvalue()
    return images


def blocks(comparison: Comparison, render: "Markdown | Html", sources: dict[str, str]) -> Iterator[str]:
    """The parts of the page, in order."""
    rows = succeeded(comparison.rows)
    yield render.heading(1, TITLE)
    yield render.table(["", ""], [[name, str(value)] for name, value in comparison.settings.items()])
    yield render.paragraph(ABOUT)
    for n in sorted({int(row["n"]) for row in rows}):
        yield render.heading(2, f"{n} tokens a row")
        yield render.table(*table([row for row in rows if int(row["n"]) == n]))
    failed = [row for row in comparison.rows if row["status"] != "ok"]
    if failed:
        yield render.heading(2, "Runs that failed")
        cells = [[row["name"], row["n"], row["seed"], row["status"]] for row in failed]
        yield render.table(["system", "n", "seed", "status"], cells)
    for name, source in sources.items():
        yield render.image(FIGURES[name], source)
    if comparison.rates:
        yield render.heading(2, "Learning rates that were tried")
        yield render.table(*rate_table(comparison.rates))
    yield render.heading(2, "Commands")
    yield render.code("\n".join(comparison.commands))


def succeeded(rows: list[dict]) -> list[dict]:
    """Rows with a loss."""
    return [row for row in rows if row["status"] == "ok" and row["valid_loss"]]


def by_name(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows of each system."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for rows of one length: the best system first."""
    systems = by_name(rows)
    losses = {name: column(own, "valid_loss") for name, own in systems.items()}
    base = BASELINE if BASELINE in systems else next(iter(systems))
    order = sorted(systems, key=lambda name: statistics.mean(losses[name]))
    header = ["system", "parameters", "rate", "seeds", "train loss", "loss", f"against {base}", "perplexity"]
    header += ["bits per byte", "per byte", "per word", "tokens/s", "seconds", "peak memory"]
    lines = []
    for name in order:
        own = systems[name]
        ties = name == order[0] or verdict(losses[name], losses[order[0]]).startswith("tie")
        line = [
            name,
            parameters(own, systems[base]),
            own[0]["lr"],
            str(len(own)),
            average(own, "train_loss", 3),
        ]
        line += [
            emphasis(spread(losses[name]), ties),
            "" if name == base else verdict(losses[name], losses[base]),
        ]
        line += [average(own, "valid_perplexity", 2), average(own, "bits_per_byte", 4)]
        line += [average(own, "byte_perplexity", 3), average(own, "word_perplexity", 1)]
        line += [average(own, "tokens_per_second", 0), average(own, "seconds", 0), memory(own)]
        lines.append(line)
    return header, lines


def rate_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for the rates that were tried: a loss for each system and rate."""
    tried = sorted({row["lr"] for row in rows}, key=float)
    lines = []
    for name, own in by_name(rows).items():
        losses = {row["lr"]: row["valid_loss"] if row["status"] == "ok" else "failed" for row in own}
        good = {rate: float(loss) for rate, loss in losses.items() if loss not in ("", "failed", "nan")}
        best = min(good, key=good.get, default="")
        edge = len(tried) > 1 and best in (tried[0], tried[-1])
        cells = [emphasis(losses.get(rate, ""), rate == best) for rate in tried]
        lines.append([name, *cells, "at the edge of what was tried" if edge else ""])
    return ["system", *tried, ""], lines


def column(rows: list[dict], name: str) -> list[float]:
    """The numbers of a column, as far as they are there."""
    return [float(row[name]) for row in rows if row[name] not in ("", None)]


def average(rows: list[dict], name: str, digits: int) -> str:
    """The mean of a column."""
    found = column(rows, name)
    return f"{statistics.mean(found):,.{digits}f}" if found else ""


def spread(losses: list[float]) -> str:
    """Mean and range."""
    reach = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{reach}"


def parameters(rows: list[dict], base: list[dict]) -> str:
    """Number of parameters, and how it differs from the baseline's."""
    own, others = (float(each[0]["parameters"]) for each in (rows, base))
    difference = f" ({100 * (own / others - 1):+.1f} %)" if rows is not base else ""
    return f"{own / 1e6:.2f} M{difference}"


def memory(rows: list[dict]) -> str:
    """The highest peak of all runs."""
    found = column(rows, "peak_memory")
    return f"{max(found) / 2**30:.2f} GiB" if found else ""


def emphasis(text: str, strong: bool) -> str:
    """Marked, in a way that both renderers understand."""
    return f"**{text}**" if strong and text else text


class Markdown:
    """Parts of a Markdown page."""

    def page(self, parts: Iterable[str]) -> str:
        return "\n\n".join(parts) + "\n"

    def heading(self, level: int, text: str) -> str:
        return f"{'#' * level} {text}"

    def paragraph(self, text: str) -> str:
        return text

    def table(self, header: list[str], lines: list[list[str]]) -> str:
        rows = [header, ["---"] * len(header), *lines]
        return "\n".join("| " + " | ".join(self._cell(cell) for cell in row) + " |" for row in rows)

    def image(self, text: str, source: str) -> str:
        return f"![{text}]({source})\n\n{text}."

    def code(self, text: str) -> str:
        return "\n".join(f"    {line}" for line in text.splitlines())

    def _cell(self, text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")


class Html:
    """Parts of an HTML page that needs no other file."""

    STYLE = """body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
        table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto }
        td, th { border: 1px solid #ccc; padding: 3px 7px; text-align: left }
        th { background: #f2f2f2 } img { max-width: 100% }
        pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }"""

    def page(self, parts: Iterable[str]) -> str:
        head = f'<meta charset="utf-8"><title>{TITLE}</title><style>{self.STYLE}</style>'
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n'
            + "\n".join(parts)
            + "\n</body></html>\n"
        )

    def heading(self, level: int, text: str) -> str:
        return f"<h{level}>{html.escape(text)}</h{level}>"

    def paragraph(self, text: str) -> str:
        return f"<p>{html.escape(text)}</p>"

    def table(self, header: list[str], lines: list[list[str]]) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(map(self._cell, line)) + "</tr>\n" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"

    def image(self, text: str, source: str) -> str:
        text = html.escape(text)
        return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'

    def code(self, text: str) -> str:
        return f"<pre>{html.escape(text)}</pre>"

    def _cell(self, text: str) -> str:
        if text.startswith("**"):
            return f"<td><strong>{html.escape(text.strip('*'))}</strong></td>"
        return f"<td>{html.escape(text)}</td>"
