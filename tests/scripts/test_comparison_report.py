"""Proves that a report says who is better, by how much, what ties, and how to do it again."""

import html
import re

import pytest

from report import comparison as comparison_report
from report import markdown
from report.comparison import Comparison, verdict

COMMANDS = ["python scripts/compare_lm.py --data 'my data'", "", "python -m fairseq_cli.train my --lr 1 <&>"]


def record(name, n, seed, loss, parameters=4_000_000, status="ok"):
    return {
        **{"name": name, "n": str(n), "seed": str(seed), "status": status, "parameters": str(parameters)},
        **{"lr": "0.002", "train_loss": "4.9", "valid_loss": str(loss), "valid_perplexity": "110.5"},
        **{"bits_per_byte": "", "byte_perplexity": "", "word_perplexity": "", "tokens_per_second": "1000"},
        **{
            "seconds": "60",
            "peak_memory": str(2**30),
            "size": "tiny",
            "budget": "640tokens",
            "updates": "10",
        },
    }


@pytest.fixture
def comparison():
    """Three systems at two lengths; flash_lm is best, and transformer_pp_lm ties with the baseline."""
    records = [record("transformer_lm", 512, seed, 4.7 + seed / 10) for seed in (1, 2)]
    records += [record("transformer_pp_lm", 512, seed, 4.75 + seed / 10) for seed in (1, 2)]
    records += [record("flash_lm", 512, seed, 4.5 + seed / 100, 4_100_000) for seed in (1, 2)]
    records += [record("transformer_lm", 1024, 1, 4.6), record("flash_lm", 1024, 1, 4.65)]
    records += [record("flash_lm", 1024, 2, "", status="error: status 1: out | of <memory>")]
    rates = [{**record("flash_lm", 512, 1, loss), "lr": lr} for lr, loss in (("0.001", 4.9), ("0.002", 4.8))]
    curves = [{**each, "split": "train", "tokens": "640", "loss": "5"} for each in records[:2]]
    return Comparison({"data": "my data", "options": "--dropout <b>"}, records, rates, curves, COMMANDS)


def lines_of(text, heading):
    """The cells of a Markdown table below a heading, by the first of each line."""
    part = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    records = [
        [cell.strip() for cell in line.split(" | ")] for line in part.splitlines() if line.startswith("|")
    ]
    return {cells[0].strip("| "): cells[1:] for cells in records}


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        ([4.5, 4.6], [4.7, 4.8], "better by 0.200"),
        ([4.9, 5.0], [4.7, 4.8], "worse by 0.200"),
        ([4.5, 4.75], [4.7, 4.8], "tie (-0.125)"),
        ([4.75], [4.7, 4.8], "tie (+0.000)"),
        ([4.5], [4.7, 4.8], "better by 0.250 (one seed)"),
        ([4.5], [4.7], "better by 0.200 (one seed)"),
    ],
)
def test_seeds_that_overlap_are_a_tie(own, other, words):
    assert verdict(own, other) == words


def test_the_table_tells_who_is_better_than_the_baseline(comparison, tmp_path):
    comparison_report.write(tmp_path / "report.md", comparison)
    text = (tmp_path / "report.md").read_text()
    table = lines_of(text, "512 tokens a row")
    assert list(table)[2:] == ["flash_lm", "transformer_lm", "transformer_pp_lm"], "the best comes first"
    assert table["flash_lm"][0] == "4.10 M (+2.5 %)"
    assert table["flash_lm"][4:6] == ["**4.515 (4.510 to 4.520)**", "better by 0.335"]
    assert table["transformer_lm"][4:6] == ["4.850 (4.800 to 4.900)", ""]
    assert table["transformer_pp_lm"][4:6] == ["4.900 (4.850 to 4.950)", "tie (+0.050)"]
    assert lines_of(text, "1024 tokens a row")["flash_lm"][4:6] == ["4.650", "worse by 0.050 (one seed)"]


def test_failures_rates_and_commands_are_there(comparison, tmp_path):
    comparison_report.write(tmp_path / "report.md", comparison)
    text = (tmp_path / "report.md").read_text()
    assert lines_of(text, "Runs that failed")["flash_lm"][2] == "error: status 1: out \\| of &lt;memory&gt; |"
    assert lines_of(text, "Learning rates that were tried")["flash_lm"] == [
        *("4.9", "**4.8**", "at the edge of what was tried |")
    ]
    assert [line.strip() for line in text.partition("## Commands\n\n")[2].splitlines()] == COMMANDS


def test_markdown_has_its_figures_beside_it(comparison, tmp_path):
    written = comparison_report.write(tmp_path / "deep" / "report.md", comparison)
    text = written[0].read_text()
    assert [path.name for path in written[1:]] == re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(written) == 5
    assert all(path.stat().st_size > 5000 for path in written[1:])


def test_html_is_one_file_and_escapes_what_it_quotes(comparison, tmp_path):
    (path,) = comparison_report.write(tmp_path / "report.html", comparison)
    text = path.read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "<strong>4.515 (4.510 to 4.520)</strong>" in text
    for quoted in ("--dropout <b>", "out | of <memory>", "--lr 1 <&>"):
        assert html.escape(quoted) in text
        assert quoted not in text


def test_a_comparison_without_a_finished_run_is_a_report_all_the_same(tmp_path):
    records = [record("flash_lm", 512, 1, "", status="error: status 1")]
    comparison_report.write(tmp_path / "report.md", Comparison({}, records, [], [], []))
    assert "error: status 1" in (tmp_path / "report.md").read_text()


def test_another_kind_of_report_is_refused(comparison, tmp_path):
    with pytest.raises(ValueError, match=r"allowed: a name that ends in \.html or \.md"):
        comparison_report.write(tmp_path / "report.pdf", comparison)


def test_the_part_of_the_split_that_was_evaluated_is_said(comparison, tmp_path):
    records = [{**each, "valid_tokens": "2500"} for each in comparison.records]
    settings = {"evaluated": "one block in 4 of the split valid"}
    told = comparison._replace(records=records, settings=settings, valid_tokens=10_000)
    comparison_report.write(tmp_path / "report.md", told)
    text = (tmp_path / "report.md").read_text()
    assert "| evaluated | one block in 4 of the split valid |" in text
    assert "all this on one block in 4 of the split valid (2,500 tokens)" in text.splitlines()[2]
    assert lines_of(text, "512 tokens a row")["flash_lm"][7] == "2,500 (25 %)"


def test_the_page_begins_with_the_answer_and_ends_with_settings(comparison, tmp_path):
    told = comparison._replace(settings={"evaluated": "the whole split valid", **comparison.settings})
    comparison_report.write(tmp_path / "report.md", told)
    text = (tmp_path / "report.md").read_text()
    answer = text.splitlines()[2]
    assert answer.startswith(
        "**In rows of 512 tokens flash_lm is better than transformer_lm by 0.335 nats a token "
    )
    assert "; in rows of 1024 tokens flash_lm is worse than transformer_lm by 0.050 nats a token " in answer
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        *("512 tokens a row", "1024 tokens a row", "Runs that failed", "Learning rates that were tried"),
        *("How to read this", "Settings", "Commands"),
    ]
    shown = comparison_report.summary(told)
    assert shown.splitlines()[-1] == answer.strip("*")
    assert re.search(r"^flash_lm +0.002 +2 +4.515 \(4.510 to 4.520\) +better by 0.335", shown, re.MULTILINE)


def test_a_figure_has_six_panels_and_the_rest_is_behind_a_click(comparison, tmp_path):
    curves = [
        {**record("flash_lm", n, 1, 5), "split": split, "tokens": "640", "loss": "5"}
        for n in (16, 32, 64, 128)
        for split in ("train", "valid")
    ]
    told = comparison._replace(curves=curves)
    written = comparison_report.write(tmp_path / "report.md", told)
    names = [path.name for path in written]
    assert {"report_tokens.png", "report_tokens_2.png"} <= set(names)
    folded = (tmp_path / "report.md").read_text().partition("<details>")[2].partition("</details>")[0]
    assert re.findall(r'src="(.*?)"', folded) == ["report_tokens_2.png"]
    (page,) = comparison_report.write(tmp_path / "report.html", told)
    assert page.read_text().count("data:image/png;base64,") == len(names) - 1


def test_nothing_quoted_is_markup(comparison, tmp_path):
    settings = {"data": "<script>alert(1)</script> [x](javascript:alert)", "options": "a | b `c`"}
    failed = [record("flash_lm", 512, 3, "", status="error: <img src=x onerror=alert(1)>")]
    told = comparison._replace(settings=settings, records=comparison.records + failed)
    for name in ("report.md", "report.html"):
        comparison_report.write(tmp_path / name, told)
        text = (tmp_path / name).read_text()
        assert "<script>" not in text
        assert "<img src=x" not in text
        assert "[x](javascript:" not in text.partition("<body>")[0], "a link in Markdown"
        assert 'href="javascript:' not in text, "a link in HTML"


@pytest.mark.parametrize("loss", ["nan", "inf", ""])
def test_a_run_that_diverged_is_left_out_and_told(comparison, tmp_path, loss):
    records = [record("flash_lm", 512, 1, 4.5), record("flash_lm", 512, 2, loss)]
    records += [record("transformer_lm", 512, seed, 4.7) for seed in (1, 2)]
    rates = [
        {**record("flash_lm", 512, 1, found), "lr": lr} for lr, found in (("0.1", "inf"), ("0.2", "nan"))
    ]
    told = comparison._replace(records=records, rates=rates)
    comparison_report.write(tmp_path / "report.md", told)
    text = (tmp_path / "report.md").read_text()
    assert "flash_lm is better than transformer_lm by 0.200 nats" in text.splitlines()[2]
    assert "without 1 of 4 runs, which failed (flash_lm)" in text.splitlines()[2]
    assert "edge" not in text.splitlines()[2]
    assert lines_of(text, "Runs that failed")["flash_lm"][1:] == ["2", f"the loss is {loss or 'nan'} |"]
    nothing = comparison._replace(records=records[1:2])
    assert comparison_report.summary(nothing) == "No run succeeded, so nothing can be said."


@pytest.mark.parametrize("text", ["**b**", "_x_", "a*b*c", "*[x]*: y", "__init__", "a_b_c", "--x '*.txt' *"])
def test_what_is_quoted_keeps_its_stars_and_bars(text):
    shown = markdown.page("t", markdown.escaped(text), {}).partition("<body>")[2].partition("</body>")[0]
    assert shown.strip() == f"<p>{text}</p>"
