"""Proves that compare_translation.py trains alike, takes the best rate, scores right, and repeats nothing."""

import csv
import json
import random

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from sacrebleu.metrics import BLEU

import compare_translation
import fairseq_flash.models.flash_seq2seq as flash_seq2seq
import prepare_translation
from support import tools

SMALL = {
    "flash_seq2seq_tiny": {
        **{"--arch": "flash_seq2seq_tiny", "--embed-dim": 32, "--attention-dim": 16},
        **{"--encoder-layers": 1, "--decoder-layers": 1},
    },
    "broken": {"--arch": "flash_seq2seq_tiny", "--chunk-size": 0},
}
PAIRED = {
    "flash_seq2seq": {"--arch": "transformer_iwslt_de_en"},
    "flash_seq2seq_tiny": compare_translation.SYSTEMS["transformer"],
    "flash_seq2seq_wmt": {"--arch": "transformer_wmt_en_de"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder of 150 sentences and their reversals."""
    folder, chooser = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = [a + b + c for a in ("ri", "sto", "wal") for b in ("ver", "ne", "king") for c in ("", "der", "x")]
    for name, count in (("train", 120), ("val", 15), ("test", 15)):
        lines = [chooser.choices(words, k=chooser.randint(3, 9)) for _ in range(count)]
        (folder / f"{name}.aa").write_text("".join(f"{' '.join(line)}.\n" for line in lines))
        (folder / f"{name}.bb").write_text("".join(f"{' '.join(reversed(line))}.\n" for line in lines))
    names = ("--train", folder / "train", "--valid", folder / "val", "--test", folder / "test")
    words = ("--source-lang", "aa", "--target-lang", "bb", *names, "--output", folder / "data")
    prepare_translation.main([str(word) for word in (*words, "--vocab-size", 300)])
    return folder / "data"


def run(words, folder) -> list[dict]:
    """Runs the command line; returns the rows of its CSV."""
    compare_translation.main([str(word) for word in words])
    return tools.rows_of(folder / "rows.csv")


def test_the_command_trains_tunes_scores_and_repeats_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_translation, "SYSTEMS", SMALL)
    words = ["--data", data, "--output", tmp_path / "rows.csv", "--folder", tmp_path / "runs"]
    words += ["--systems", *SMALL, "--rates", 0.001, "--tuning-epochs", 1, "--epochs", 2]
    words += ["--max-tokens", 512, "--jobs", 2, "--device", "cpu", "--seeds", 1]
    rows = run(words, tmp_path)
    printed = capsys.readouterr().out
    answer = "nobody to compare it with; all this on the whole split test (15 sentences)"
    assert printed.endswith(f"{answer}, without 1 of 2 runs, which failed (broken).\n")
    assert [
        (row["name"], row["stage"], row["status"][:5]) for row in sorted(rows, key=lambda r: r["name"])
    ] == [
        ("broken", "learning rate", "error"),
        ("flash_seq2seq_tiny", "learning rate", "ok"),
        ("flash_seq2seq_tiny", "final", "ok"),
    ]
    failed = next(row for row in rows if row["name"] == "broken")
    assert "chunk_size=0 is not allowed" in failed["status"]
    assert "broken: no learning rate succeeded" in printed
    tuned, final = (row for row in rows if row["name"] == "flash_seq2seq_tiny")
    updates = compare_translation.count_batches(data, "aa", "bb", 512)
    assert [int(row["updates"]) for row in (tuned, final)] == [updates, 2 * updates]
    assert 0 <= float(final["bleu"]) <= 100
    assert "tok:13a" in final["signature"]
    assert str(data.parent) not in final["command"], "of this machine"
    assert final["command"].startswith("fairseq-train data --user-dir fairseq_flash --task translation")
    assert run(words, tmp_path) == rows
    (place,) = (tmp_path / "runs").glob("flash_seq2seq_tiny-*-final-*")
    output = tools.call(
        *("generate", data, "--user-dir", tools.USER_DIR, "--path", place / "checkpoint_last.pt", "--cpu"),
        *("--beam", 5, "--remove-bpe", "sentencepiece", "--max-len-a", 1.2, "--max-len-b", 10),
    )
    texts = [tools.rows(output, "D")[str(number)][0][1] for number in range(15)]
    reference = (data / "test.raw.bb").read_text().splitlines()
    expected = BLEU().corpus_score(texts, [reference]).score
    assert float(final["bleu"]) == pytest.approx(expected, abs=0.01)


def test_an_epoch_has_as_many_updates_as_fairseq_makes(data, tmp_path):
    words = [word for option in SMALL["flash_seq2seq_tiny"].items() for word in option]
    recipe = ("--optimizer", "adam", "--max-tokens", 256, "--max-epoch", 1, "--cpu", "--num-workers", 0)
    output = tools.call(
        *("train", data, "--user-dir", tools.USER_DIR, "--task", "translation", *words, *recipe),
        *("--save-dir", tmp_path, "--no-save", "--log-format", "json", "--log-interval", 1),
    )
    updates = compare_translation.count_batches(data, "aa", "bb", 256)
    assert len(tools.losses(output)) == updates > 4


def test_the_best_rate_is_that_of_the_lowest_finite_loss_of_the_same_plan(data, tmp_path):
    words = ["--data", str(data), "--output", str(tmp_path / "rows.csv"), "--updates-per-epoch", "1"]
    plan = compare_translation.Plan(compare_translation.parse(words))
    row = dict.fromkeys(compare_translation.COLUMNS, "")
    row |= dict(
        plan.earlier.shared, name="transformer", stage="learning rate", epochs="2", status="ok", seed=1
    )
    found = [
        dict(row, lr="0.001", valid_loss="3.5"),
        dict(row, lr="0.002", valid_loss="3.2"),
        dict(row, lr="0.004", valid_loss="nan"),
        dict(row, lr="0.008", valid_loss="1.0", status="error: killed"),
        dict(row, lr="0.016", valid_loss="1.0", epochs="1"),
        dict(row, lr="0.064", valid_loss="1.0", updates_per_epoch="2"),
        dict(row, lr="0.128", valid_loss="1.0", seed="2"),
        dict(row, lr="0.032", valid_loss="1.0", name="flash_seq2seq_tiny", data="other"),
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, compare_translation.COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    assert plan.best_rate("transformer") == 0.002
    assert plan.best_rate("flash_seq2seq_tiny") is None


def test_the_end_is_a_table_and_an_answer_over_the_seeds(data, tmp_path):
    words = ["--data", str(data), "--output", str(tmp_path / "rows.csv"), "--updates-per-epoch", "1"]
    plan = compare_translation.Plan(compare_translation.parse([*words, "--seeds", "1", "2", "3"]))
    row = dict.fromkeys(compare_translation.COLUMNS, "") | plan.earlier.shared
    row |= dict(status="ok", valid_loss="3", parameters="7", tokens_per_second="9", seconds="5")
    found = []
    for name, scores in {"flash_seq2seq_tiny": (38, 39), "transformer": (30, 31.5)}.items():
        tried = dict(row, name=name, stage="learning rate", epochs=2, seed=1)
        found += [dict(tried, lr=0.001, valid_loss=4), dict(tried, lr=0.002)]
        if name == "transformer":
            found.append(dict(tried, lr=0.004, valid_loss="nan"))
        final = dict(row, name=name, stage="final", epochs=12, lr=0.002)
        found += [dict(final, seed=seed, bleu=bleu) for seed, bleu in enumerate(scores, start=1)]
        found.append(dict(final, seed=1, lr=0.001, bleu=99))
    found.append(dict(final, seed=3, status="error: out of memory", valid_loss=""))
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, compare_translation.COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    told = compare_translation.report(plan).splitlines()
    assert told[0].split() == [
        "system",
        "rate",
        "seeds",
        "BLEU",
        "against",
        "transformer",
        "tokens/s",
        "seconds",
    ]
    assert told[2].split()[:6] == ["flash_seq2seq_tiny", "0.002", "2", "38.50", "(38.00", "to"]
    assert "better by 7.75" in told[2]
    assert told[-1] == (
        "flash_seq2seq_tiny is better than transformer by 7.75 BLEU (proven by 2 seeds, 95 % interval "
        "+4.57 to +10.93); all this on the whole split test (15 sentences), without 1 of 5 "
        "runs, which failed (transformer); the best rate of flash_seq2seq_tiny, 0.002, is at the edge of "
        "what was tried: another may be better."
    )
    finals = [(run.record["name"], run.record["lr"], run.record["seed"]) for run in plan.final()]
    assert finals == [(name, 0.002, seed) for name in plan.options.systems for seed in (1, 2, 3)]


def test_all_runs_differ_in_nothing_but_system_and_rate(data, tmp_path):
    words = ["--data", str(data), "--output", str(tmp_path / "rows.csv"), "--updates-per-epoch", "7"]
    plan = compare_translation.Plan(compare_translation.parse([*words, "--device", "cpu"]))
    runs = list(plan.tuning())
    assert len(runs) == 2 * len(compare_translation.RATES)
    assert {run.updates for run in runs} == {14}
    systems = [
        [str(w) for o in compare_translation.SYSTEMS[name].items() for w in o]
        for name in plan.options.systems
    ]
    common = set()
    for run, system in zip(runs, systems * len(compare_translation.RATES), strict=True):
        rest = list(run.words[: -1 - len(system)])
        assert list(run.words[-1 - len(system) : -1]) == system
        rest[rest.index("--lr") + 1] = ""
        common.add(tuple(rest))
    assert len(common) == 1
    assert "--share-all-embeddings" in common.pop()


def test_translations_are_read_in_the_order_of_the_sources():
    output = "S-1\tx\nH-1\t-0.5\tno\nD-1\t-0.5\tb c\nD-10\t-0.1\t\nD-0\t-1\ta\u2028 D-3\nGenerate test\n"
    assert compare_translation.hypotheses(output) == ["a\u2028 D-3", "b c", ""]
    with pytest.raises(ValueError, match="2 translations of 3 reference lines"):
        compare_translation.score(["a", "b"], ["a", "b", "c"])
    assert compare_translation.score(["a b c d"], ["a b c d"])[0] == pytest.approx(100)


@pytest.mark.parametrize("arch", PAIRED)
@pytest.mark.parametrize("vocabulary", [2000, 8000, 37000])
@pytest.mark.parametrize("sharing", [(), ("--share-all-embeddings",)], ids=["apart", "shared"])
def test_an_architecture_has_the_parameters_of_its_transformer_within_a_twentieth(arch, vocabulary, sharing):
    assert set(PAIRED) == set(flash_seq2seq.PRESETS)
    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"word{index}")
    sizes = []
    for system in ({"--arch": arch}, PAIRED[arch]):
        words = ["data", "--task", "translation", *(str(word) for item in system.items() for word in item)]
        args = options.parse_args_and_arch(options.get_training_parser(), [*words, *sharing])
        cfg = convert_namespace_to_omegaconf(args)
        with torch.device("meta"):
            model = tasks.TASK_REGISTRY["translation"](cfg.task, dictionary, dictionary).build_model(
                cfg.model
            )
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data nowhere has no prepare.json"),
        (["--jobs", "0"], "--jobs 0 is not allowed; allowed: 1 or more"),
        (["--epochs", "-1"], "--epochs -1 is not allowed"),
        (["--systems", "lstm"], "invalid choice: 'lstm'"),
    ],
)
def test_a_mistake_is_named(data, capsys, more, message):
    with pytest.raises(SystemExit):
        compare_translation.parse(["--data", str(data), *more])
    assert message in capsys.readouterr().err


def test_data_with_separate_vocabularies_share_what_can_be_shared(data, tmp_path):
    record = json.loads((data / "prepare.json").read_text())
    record["options"]["separate"] = True
    (tmp_path / "prepare.json").write_text(json.dumps(record))
    words = ["--data", str(tmp_path), "--output", str(tmp_path / "rows.csv"), "--updates-per-epoch", "1"]
    plan = compare_translation.Plan(compare_translation.parse(words))
    run = next(plan.tuning())
    assert "--share-decoder-input-output-embed" in run.words
    assert "--share-all-embeddings" not in run.words
