"""Proves that every figure is drawn from its CSV alone, with one look a system and nothing that failed."""

import csv
import itertools
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest

import plot
from report import figures
from report import style as plot_style
from support import tools

SYSTEMS = {"flash_lm": 4.6, "transformer_lm": 4.8, "my_lm": 4.7}
COMMON = {"size": "tiny", "budget": "1000tokens", "device": "cpu", "jobs": "1", "status": "ok"}


def write(path, rows):
    columns = {column: None for row in rows for column in row}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def comparison():
    for name, loss in SYSTEMS.items():
        for n, seed in ((512, 1), (512, 2), (1024, 1)):
            row = {"name": name, "n": n, "seed": seed, "stage": "final", **COMMON}
            yield {**row, "valid_loss": loss + seed / 100, "tokens_per_second": 1000 * loss}


def curves():
    for row in comparison():
        for updates in range(10, 101, 10):
            place = {"updates": updates, "tokens": updates * 10, "seconds": updates + row["seed"] / 10}
            for split in ("train", "valid"):
                yield {**row, **place, "split": split, "loss": 4 + 10 / updates}


def training():
    for name in SYSTEMS:
        for n in (512, 1024):
            row = {"name": name, "n": n, "dtype": "float32", "threads": 2, **COMMON}
            yield {**row, "tokens_per_s": 1e9 / n, "peak_memory": 1e6 * n}
    yield {"name": "my_lm", "n": 2048, "dtype": "float32", "threads": 2, **COMMON, "status": "out of memory"}


def generation():
    for name in SYSTEMS:
        for n in (256, 512):
            row = {"name": name, "pass": "step", "b": 1, "beam": 1, "n": n, "dtype": "float32", "threads": 2}
            yield {**COMMON, **row, "median_ms": n, "state_bytes": n, "peak_memory": n, "torch": "2.13"}


def gpu():
    for name in ("flash_lm", "flash_lm --compile", "transformer_lm"):
        for n in (1024, 8192):
            row = {"name": name, "n": n, "dtype": "bf16", **COMMON, "device": "a card", "kind": "lm"}
            # Measured again, it is drawn as it was measured last.
            yield {**row, "tokens": 32768, "tokens_per_s": 1, "peak_memory": 1e9}
            yield {**row, "tokens": 32768, "tokens_per_s": 1e9 / n, "peak_memory": 1e9}
    # One with another batch, or of another kind, is no point of these lines.
    yield {**row, "tokens": 131072, "tokens_per_s": 1, "peak_memory": 1}
    yield {**row, "kind": "masked_lm", "tokens": 32768, "tokens_per_s": 1, "peak_memory": 1}


def ops():
    for name, compiled in itertools.product(("flash/triton", "transformer_pp"), ("no", "yes")):
        for n, kind in itertools.product((512, 8192), ("forward", "training step")):
            row = {"name": name, "compiled": compiled, "pass": kind, "n": n, **COMMON, "device": "a card"}
            yield {**row, "tokens_per_s": 1e9 / n if kind == "forward" else 1e8 / n, "peak_memory": 1e9}


def masked():
    for amount, gain in ((1000, 0), (2000, 100)):
        for name, loss in (("flash_masked_lm", 300), ("roberta", 600)):
            row = {"name": name, "data": "books", "pretraining": amount, "n": 512, "status": "ok"}
            for rate in (1e-3, 2e-3):
                known = {"stage": "pretraining", "lr": rate, "seed": 1}
                yield {**row, **known, "valid_perplexity": loss - gain + 1000 * rate}
            for rate, seeds in ((1e-4, (1,)), (3e-4, (1, 2))):
                known = {"stage": "fine-tuning", "lr": rate, "pooling": "first"}
                for seed in seeds:
                    yield {**row, **known, "seed": seed, "test_accuracy": gain / 4 + 10 * len(seeds) + seed}
    for data, right in (("books", 42.5), ("others", 99)):
        yield {"name": "naive_bayes", "data": data, "stage": "counts", "n": 512, "test_accuracy": right}


def translation():
    for data in ("ende", "enfr"):
        for name, bleu in (("flash_seq2seq_tiny", 38), ("transformer", 37), ("transformer pre-norm", 39)):
            row = {"name": name, "data": data, "updates_per_epoch": 9, "seed": 1, "status": "ok"}
            for rate in (1e-3, 2e-3):
                yield {**row, "stage": "learning rate", "epochs": 2, "lr": rate, "valid_loss": 3 + 100 * rate}
            yield {**row, "stage": "final", "epochs": 12, "lr": 1e-3, "valid_loss": 2, "bleu": bleu}
            short = {"updates_per_epoch": 1, "epochs": 1, "lr": 5e-3, "valid_loss": 9}
            yield {**row, "stage": "learning rate", **short}


def extrapolation():
    for name in SYSTEMS:
        for n in (1024, 2048):
            for place, positions in enumerate(("all", "0-1024", "1024-2048")[: 1 + n // 1024]):
                row = {"name": name, "data": "books", "split": "test", "n": n, "positions": positions}
                yield {**row, "perplexity": 100 + n / 1024 + place, "status": "ok"}


def ablation():
    for value, loss in (("", 5.0), ("0.1", 5.1), ("0.3", 4.9)):
        row = {"base": "flash_lm", "factor": "gamma" if value else "", "value": value, **COMMON, "n": 512}
        yield {**row, "stage": "factor", "seed": 1, "valid_loss": loss}
    yield {**row, "stage": "learning rate", "seed": 1, "valid_loss": 9}


def yardsticks():
    for name, loss in SYSTEMS.items():
        for yardstick, places in (
            ("recurrence", ("1-127", "new")),
            ("copy", (64, 1024)),
            ("context", (8, 16)),
        ):
            for place, x in enumerate(places):
                row = {"name": name, "yardstick": yardstick, "x": x, "data": "d", "split": "test", **COMMON}
                yield {**row, "n": 8, "against": "a", "loss": loss, "gain": 4.7 - loss + place}
        for x in (64, 256, 1024):
            row = {"name": name, "yardstick": "passkey", "x": x, "data": "d", "split": "test", **COMMON}
            yield {**row, "against": "-", "loss": loss, "accuracy": (loss - 4) / x}


def candidates():
    for name, loss in (("flash", 3), ("transformer_pp", 4), ("flash+norm", 5)):
        for lr, seed, tokens in (("1e-3", 1, 100), ("1e-3", 2, 100), ("2e-3", 1, 100), ("1e-3", 1, 10)):
            found = loss + float(lr) * 10 + (tokens == 10)
            row = {"name": name, "data": "d", "lr": lr, "seed": seed, "tokens": tokens, **COMMON}
            row |= {f"loss_{part}": found for part in ("near", "mid", "far", "new")}
            row |= {f"alone_{x}": found for x in ("4n", "16n")}
            yield {**row, "valid_loss": found, "loss_4n": found + 1, "loss_16n": found + loss}


@pytest.fixture
def results(tmp_path):
    """A folder of measurements of three systems, one of them unknown."""
    for name, rows in (
        ("comparison", comparison()),
        ("comparison_curves", curves()),
        ("training", training()),
        ("generation", generation()),
        ("ablation", ablation()),
        ("fairseq_train", gpu()),
        ("ops", ops()),
        ("extrapolation", extrapolation()),
        ("masked_lm", masked()),
        ("translation", translation()),
        ("yardsticks", yardsticks()),
        ("candidates", candidates()),
    ):
        write(tmp_path / f"{name}.csv", list(rows))
    return tmp_path


def draw(name, path):
    """A figure of one page."""
    (figure,) = figures.draw(name, path)
    return figure


def drawn_lines(figure, label):
    return [line for axis in figure.axes for line in axis.get_lines() if line.get_label() == label]


def test_every_figure_becomes_a_png_and_where_asked_an_svg(results):
    plot.main(["--results", str(results)])
    assert not list(results.rglob("*.svg"))
    plot.main(["--results", str(results), "--svg"])
    written = {path.name: path.stat().st_size for path in results.glob("figures/*.[ps][nv]g")}
    stems = [
        "generation",
        "training",
        "candidates",
        *("ablation", "fairseq_train", "ops", "extrapolation", "masked_lm", "translation"),
        *(f"comparison_{f}" for f in ("tokens", "seconds", "quality", "ablation")),
        *(f"yardsticks_{f}" for f in ("recurrence", "copy", "context", "passkey")),
    ]
    assert set(written) == {f"{stem}.{end}" for stem in stems for end in ("png", "svg")}
    assert min(written.values()) > 10_000
    for path in results.glob("figures/*.png"):
        image = plt.imread(path)
        assert image.shape[0] > 300
        assert image[..., :3].std() > 0.05, f"{path.name} is blank"


def test_a_system_looks_the_same_in_every_figure(results):
    looks = set()
    for name in ("generation", "training", "tokens", "seconds"):
        figure = draw(name, results / figures.FIGURES[name].csv)
        looks |= {line.get_color() for line in drawn_lines(figure, "transformer_lm")}
        plt.close(figure)
    assert looks == {plot_style.style("transformer_lm", SYSTEMS)["color"]}
    assert plot_style.style("transformer_lm_tiny", []) == plot_style.style("transformer_lm", [])
    colours = [colour for colour, _ in plot_style.STYLES.values()]
    assert len(set(colours)) == len(colours)


def test_a_system_with_options_keeps_its_colour_and_stands_out_from_the_bare_one(results):
    figure = draw("gpu", results / "fairseq_train.csv")
    bare, other, tuned = figure.axes[0].get_lines()
    assert bare.get_color() == tuned.get_color() != other.get_color()
    assert [line.get_linestyle() for line in (bare, tuned, other)] == [":", "-", "-"]
    assert min(line.get_ydata().min() for line in (bare, tuned, other)) > 1


@pytest.mark.parametrize(
    ("budget", "told"),
    [("1minutes", "1 minute"), ("0.5minutes", "0.5 minutes"), ("50000tokens", "50,000 tokens")],
)
def test_a_budget_is_told_in_words(budget, told):
    assert plot_style.shared(plot_style.frame([{"budget": budget}]), ("budget",)) == told


def test_a_long_title_breaks_no_option():
    lines = plot_style.in_lines(
        "gpt, bfloat16, --eval-shards 2 --compile --optimizer fused_adam", 32
    ).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 32
    assert "--eval-shards" in " ".join(lines).split()


def test_layers_show_their_training_steps_compiled_or_not(results):
    axis = draw("ops", results / "ops.csv").axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
    names = ("flash/triton", "transformer_pp")
    assert lines == {f"{name}{how}": [1e8 / 512, 1e8 / 8192] for name in names for how in ("", " compiled")}


def test_perplexity_by_position_is_that_of_the_longest_rows(results):
    (axis,) = draw("positions", results / "extrapolation.csv").axes
    for line in axis.get_lines():
        assert line.get_xdata().tolist() == [1024, 2048]
        assert line.get_ydata().tolist() == [103, 104]


def test_candidates_show_loss_by_distance_and_what_longer_rows_cost_at_the_best_rate(results):
    distance, longer = draw("candidates", results / "candidates.csv").axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in distance.get_lines()}
    expected = {"flash": 3.01, "transformer_pp": 4.01, "flash+norm": 5.01}
    assert lines == {name: pytest.approx([loss] * 4) for name, loss in expected.items()}
    more = {line.get_label(): line.get_ydata().tolist() for line in longer.get_lines()}
    assert more == {name: pytest.approx([0, 1, int(loss)]) for name, loss in expected.items()}


def test_masked_models_show_perplexity_by_rate_and_accuracy_over_the_seeds(results):
    first, second, accuracy, later = draw("masked", results / "masked_lm.csv").axes
    assert [axis.get_title() for axis in (first, second)] == ["after 1,000 tokens", "after 2,000 tokens"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in second.get_lines()}
    assert lines == {"flash_masked_lm": [201, 202], "roberta": [501, 502]}
    assert [text.get_text() for text in accuracy.texts] == ["21.5"] * 2, "of the rate with all seeds"
    assert [text.get_text() for text in later.texts] == ["46.5"] * 2
    assert [label.get_text() for label in later.get_xticklabels()] == ["512 tokens a row\npooling first"]
    for axis in (accuracy, later):
        words = next(lines for lines in axis.collections if lines.get_label() == "counts of tokens alone")
        assert [segment[:, 1].tolist() for segment in words.get_segments()] == [[42.5, 42.5]]


def test_masked_models_of_two_corpora_are_not_one_line(results):
    path = results / "masked_lm.csv"
    tried = [row for row in tools.rows_of(path) if row["stage"] == "pretraining"]
    write(path, [*tried, *({**row, "data": "code"} for row in tried)])
    lines = draw("masked", path).axes[0].get_lines()
    corpus = tried[0]["data"]
    expected = {f"{name}, {data}" for name in ("flash_masked_lm", "roberta") for data in (corpus, "code")}
    assert {line.get_label() for line in lines} == expected


def test_translation_shows_the_search_for_a_rate_and_bleu(results):
    figure = draw("translation", results / "translation.csv")
    assert [axis.get_title() for axis in figure.axes] == ["ende", "ende", "enfr", "enfr"]
    for line in figure.axes[0].get_lines():
        assert line.get_xdata().tolist() == [1e-3, 2e-3], "a short try is no search"
    assert [bar.get_height() for bar in figure.axes[1].patches] == [38, 37, 39]
    assert len({bar.get_facecolor() for bar in figure.axes[1].patches}) == 3


def test_lines_are_means_over_seeds(results):
    figure = draw("quality", results / "comparison.csv")
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_color() == "#0072B2"][:1]
    assert line.get_ydata() == pytest.approx([4.615, 4.61])
    figure = draw("tokens", results / "comparison_curves.csv")
    assert drawn_lines(figure, "flash_lm")[0].get_xdata().tolist() == [10.0 * k for k in range(10, 101, 10)]


def test_bars_are_differences_from_flash_lm(results):
    figure = draw("ablation", results / "comparison.csv")
    bars = {bar.get_facecolor(): bar.get_width() for bar in figure.axes[0].patches}
    assert len(bars) == len(SYSTEMS), "two systems share a colour"
    assert sorted(bars.values()) == pytest.approx([0.0, 0.1, 0.2])


def test_factors_are_differences_from_what_is_unchanged(results):
    (axis,) = draw("factors", results / "ablation.csv").axes
    bars = dict(zip((label.get_text() for label in axis.get_yticklabels()), axis.patches, strict=True))
    widths = {label: bar.get_width() for label, bar in bars.items()}
    assert widths == pytest.approx({"gamma: 0.3": -0.1, "gamma: 0.1": 0.1, "unchanged": 0.0})


def test_a_yardstick_is_a_line_of_what_it_measures_by_place(results):
    figure = draw("copy", results / "yardsticks.csv")
    assert drawn_lines(figure, "flash_lm")[0].get_ydata() == pytest.approx([0.1, 1.1])
    (axis,) = draw("recurrence", results / "yardsticks.csv").axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1-127", "new"]
    figure = draw("context", results / "yardsticks.csv")
    assert drawn_lines(figure, "flash_lm")[0].get_ydata() == pytest.approx([4.6, 4.6])
    rows = [{**row, "gain": ""} for row in yardsticks()]
    write(results / "alone.csv", rows)
    figure = draw("recurrence", results / "alone.csv")
    assert drawn_lines(figure, "flash_lm")[0].get_ydata() == pytest.approx([4.6, 4.6])


def test_failed_runs_and_searches_for_a_rate_are_left_out(results):
    rows = list(comparison())
    wrong = {**rows[0], "valid_loss": 99}
    rows += [{**wrong, "stage": "rate"}, {**wrong, "status": "error: x"}, {**wrong, "valid_loss": "nan"}]
    write(results / "more.csv", rows)
    drawn = [draw("ablation", results / name) for name in ("comparison.csv", "more.csv")]
    assert len({str([bar.get_width() for bar in figure.axes[0].patches]) for figure in drawn}) == 1


def test_budgets_do_not_share_a_panel(results):
    rows = list(comparison())
    write(results / "two.csv", rows + [{**row, "budget": "9tokens", "valid_loss": 3} for row in rows])
    assert len(draw("quality", results / "two.csv").axes) == 2
    assert len(draw("ablation", results / "two.csv").axes) == 4


def test_a_figure_of_many_panels_has_pages(results):
    rows = list(comparison())
    many = [{**row, "budget": f"{k}tokens"} for k in range(7) for row in rows]
    write(results / "comparison.csv", many)
    assert [len(figure.axes) for figure in figures.draw("ablation", results / "comparison.csv")] == [6, 6, 2]
    assert [len(figure.axes) for figure in figures.draw("quality", results / "comparison.csv")] == [6, 1]
    plot.main(["quality", "--results", str(results)])
    names = {path.name for path in (results / "figures").iterdir()}
    assert names == {"comparison_quality.png", "comparison_quality_2.png"}


def test_a_curve_of_one_point_is_seen(results):
    write(results / "one.csv", [row for row in curves() if row["updates"] == 10 and row["n"] == 512])
    figure = draw("tokens", results / "one.csv")
    assert {line.get_marker() for line in drawn_lines(figure, "flash_lm")} == {"o"}
    figure = draw("tokens", results / "comparison_curves.csv")
    assert "" in {line.get_marker() for line in drawn_lines(figure, "flash_lm")}


def test_labels_hide_neither_points_nor_each_other(results):
    """Four points of which two are nearly the same, and one is in a corner."""
    rows = next(comparison())
    places = {512: (1000, 4.6), 1024: (1004, 4.601), 2048: (2000, 4.6), 4096: (1500, 5.0)}
    points = [
        {**rows, "n": n, "tokens_per_second": speed, "valid_loss": loss}
        for n, (speed, loss) in places.items()
    ]
    write(results / "close.csv", points)
    figure = draw("quality", results / "close.csv")
    (axis,) = figure.axes
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert set(boxes) == set(map(str, places))
    inside = axis.get_window_extent()
    for label, box in boxes.items():
        assert inside.contains(*box.min), label
        assert inside.contains(*box.max), label
        assert not any(box.overlaps(other) for name, other in boxes.items() if name != label)
        assert not any(box.contains(*axis.transData.transform(place)) for place in places.values())


def test_steps_on_several_devices_have_panels_of_their_own(results):
    path = results / "steps.csv"
    write(path, [{**row, "device": device} for device in ("a card", "cpu") for row in generation()])
    figure = draw("generation", path)
    titles = [axis.get_title() for axis in figure.axes[::3]]
    assert titles == ["a card, batch 1, beam 1", "cpu, batch 1, beam 1"]
    plt.close(figure)


@pytest.mark.parametrize("times", [1.5, 2, 3, 4, 6, 15, 80, 900, 1e4])
def test_numbers_of_an_axis_do_not_touch(results, times):
    """On the small panels of steps that take up to so many times as long as others."""
    rows = [{**row, "median_ms": 6 if row["n"] == 256 else 6 * times} for row in generation()]
    write(results / "steps.csv", rows)
    figure = draw("generation", results / "steps.csv")
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    ticks = [each for each in figure.axes[0].yaxis.get_major_ticks() if low <= each.get_loc() <= high]
    boxes = [each.label1.get_window_extent() for each in ticks]
    assert len(boxes) > 1
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    plt.close(figure)


def test_an_svg_is_the_same_each_time(results):
    path = results / "comparison.csv"
    assert len({figures.svg(draw("quality", path)) for _ in range(2)}) == 1


def test_one_figure_goes_beside_its_csv(results):
    (results / "training.csv").rename(results / "mine.csv")
    plot.main(["training", "--csv", str(results / "mine.csv")])
    assert (results / "mine.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quality", "--csv", "no.csv"], "no.csv does not exist"),
        (["quality", "--csv", "training.csv"], "has no records with valid_loss, tokens_per_second"),
        (["quality", "--csv", "failed.csv"], "has no finished run"),
    ],
)
def test_what_cannot_be_drawn_is_named(results, words, message, monkeypatch):
    monkeypatch.chdir(results)
    write(results / "failed.csv", [{**row, "status": "error: x"} for row in comparison()])
    with pytest.raises(SystemExit, match=message):
        plot.main(words)


def test_a_folder_of_results_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit):
        plot.main(["gpu", "--results", "/none"])
    assert "--results /none does not exist; allowed: " in capsys.readouterr().err


def test_unknown_figures_are_named(capsys):
    with pytest.raises(SystemExit):
        plot.main(["pie"])
    assert "pie is unknown; allowed: generation, training" in capsys.readouterr().err


def test_plotting_needs_neither_torch_nor_fairseq(results):
    code = f"import sys; sys.path.insert(0, {str(tools.REPOSITORY / 'scripts')!r}); import plot; "
    code += f"plot.main(['quality', '--results', {str(results)!r}]); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'fairseq')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_needs_nothing_that_is_not_installed_and_drawing_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "report.figures", None)
    with pytest.raises(SystemExit) as stopped:
        plot.main(["--help"])
    assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        plot.main(["quality"])
    assert stopped.value.code == 2
    assert 'pip install -e ".[plot]"' in capsys.readouterr().err


def test_committed_figures_are_small(results):
    sizes = {path.name: path.stat().st_size for path in (plot.RESULTS / "figures").iterdir()}
    assert {"comparison_quality.png", "fairseq_train.png", "extrapolation.png"} <= set(sizes)
    assert {name.rpartition(".")[2] for name in sizes} == {"png"}
    assert max(sizes.values()) < 250_000, sizes
