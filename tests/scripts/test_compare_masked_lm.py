"""Proves that compare_masked_lm.py trains what it says, chooses on valid alone, and repeats nothing."""

import csv
import re

import pytest
import torch
from fairseq import checkpoint_utils

from runs.classification import naive_bayes
from support import tools
from support.tools import rows_of

SCRIPT = tools.REPOSITORY / "scripts" / "compare_masked_lm.py"
ROBERTA = (
    *("--user-dir", tools.USER_DIR, "--arch", "roberta", *tools.QUICK, *tools.ADAM),
    *("--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"),
    *("--encoder-attention-heads", "2"),
)


@pytest.fixture(scope="module")
def compare():
    return tools.load_script("compare_masked_lm")


@pytest.fixture
def folders(tmp_path, data_bin):
    """Data of both kinds, as far as the command line looks at them."""
    classes = tmp_path / "classes" / "input0"
    classes.mkdir(parents=True)
    (classes / "test.bin").touch()
    (classes / "dict.txt").write_bytes((data_bin / "dict.txt").read_bytes())
    return ["--data", str(data_bin), "--classes", str(classes.parent)]


def write_rows(path, columns, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({**dict.fromkeys(columns, ""), **row} for row in rows)


def pretrained(name, lr, loss, status="ok", budget=2000):
    return dict(name=name, stage="pretraining", n=512, lr=lr, seed=1, pretraining=budget) | dict(
        valid_loss=loss, valid_perplexity=7, parameters=5, tokens_per_second=3, status=status
    )


def tuned(name, n, lr, seed, valid, test):
    return dict(name=name, stage="fine-tuning", n=n, lr=lr, seed=seed, pretraining=2000, epochs=10) | dict(
        valid_loss=1, valid_accuracy=valid, test_accuracy=test, status="ok", pooling="first", parameters=5
    )


@pytest.fixture
def plan(compare, folders, tmp_path):
    """A plan with rows: of FLASH 0.002 is best, of RoBERTa the one with the norm first."""
    places = ["--output", str(tmp_path / "rows.csv"), "--folder", str(tmp_path / "work")]
    options = compare.parse([*folders, *places, "--tokens", "2000"])
    rows = [
        pretrained("flash_masked_lm", "0.001", 6.5),
        pretrained("flash_masked_lm", "0.002", 6.25),
        pretrained("flash_masked_lm", "0.004", "nan"),
        pretrained("flash_masked_lm", "0.008", 1.0, status="error: out of memory"),
        pretrained("flash_masked_lm", "0.001", 2.0, budget=4000),
        pretrained("flash_quad_masked_lm", "0.001", 6.0),
        pretrained("roberta", "0.001", 6.75),
        pretrained("roberta_prenorm", "0.002", 6.5),
    ]
    for name in ("flash_masked_lm", "roberta_prenorm"):
        for n in (2048, 512):
            rows += [tuned(name, n, "0.0001", 1, 60, 99), tuned(name, n, "0.0003", 1, 70, 10)]
            rows += [tuned(name, n, "0.0003", 2, 50, 20)]
    classes = options.classes
    (classes / "prepare.json").write_text('{"splits": {"train": {"examples": 20}}}')
    (classes / "label").mkdir()
    (classes / "label" / "dict.txt").write_text("a 1\nb 1\nc 1\n")
    plan = compare.Plan(options)
    stages = {"pretraining": plan.pretrained, "fine-tuning": plan.fine_tuned}
    rows = [{**row, "data": stages[row["stage"]].shared["data"]} for row in rows]
    rows.append({**pretrained("flash_masked_lm", "0.001", 0.5), "data": "another-text"})
    write_rows(options.output, compare.COLUMNS, rows)
    plan.checkpoints.mkdir(parents=True)
    table = torch.arange(514.0).unsqueeze(1)
    state = {"model": {"encoder.sentence_encoder.embed_positions.weight": table}}
    for name in ("flash_masked_lm", "roberta_prenorm"):
        torch.save(state, plan.checkpoints / f"{kept(plan, name)}.pt")
    return plan


def kept(plan, name):
    return f"{name}-{plan.pretrained.shared['data']}-512-0.002-1-2000"


def option(run, name):
    return run.words[run.words.index(name) + 1]


def test_the_best_successful_checkpoint_of_each_kind_is_fine_tuned(plan):
    runs = list(plan.rates())
    assert {run.record["name"] for run in runs} == {"flash_masked_lm", "roberta_prenorm"}
    assert {(run.record["n"], run.record["lr"]) for run in runs} == {
        (n, rate) for n in (2048, 512) for rate in (1e-4, 3e-4, 1e-3)
    }
    files = {
        (run.record["name"], run.record["n"]): option(run, "--restore-file").split("/")[-1] for run in runs
    }
    assert files == {
        ("flash_masked_lm", 2048): f"{kept(plan, 'flash_masked_lm')}.pt",
        ("flash_masked_lm", 512): f"{kept(plan, 'flash_masked_lm')}.pt",
        ("roberta_prenorm", 2048): f"{kept(plan, 'roberta_prenorm')}-positions2048.pt",
        ("roberta_prenorm", 512): f"{kept(plan, 'roberta_prenorm')}.pt",
    }
    assert all(option(run, "--max-positions") == str(run.record["n"]) for run in runs)
    assert {run.updates for run in runs} == {10 * 3}
    assert {option(run, "--num-classes") for run in runs} == {"3"}


def test_the_rate_of_the_other_seeds_is_chosen_on_valid_and_not_on_test(plan):
    assert {(run.record["lr"], run.record["seed"]) for run in plan.seeds()} == {(3e-4, 2), (3e-4, 3)}
    assert len(list(plan.seeds())) == 2 * 2 * 2


def test_a_checkpoint_that_is_gone_and_a_kind_without_success_are_named(plan):
    (plan.checkpoints / f"{kept(plan, 'flash_masked_lm')}.pt").unlink()
    with pytest.raises(ValueError, match=r"flash_masked_lm-.*-2000.pt is gone: delete its record"):
        plan.best_pretrained("flash")
    plan.options.tokens = 77
    with pytest.raises(ValueError, match=r"no pretraining of roberta succeeded"):
        type(plan)(plan.options).best_pretrained("roberta")


def test_every_system_is_pretrained_with_each_of_its_rates_on_the_same_tokens(compare, plan):
    plan.options.tokens = 2_000_000
    runs = list(plan.pretraining())
    names = ("flash_masked_lm", "roberta", "roberta_prenorm")
    expected = {(name, rate) for name in names for rate in compare.SYSTEMS[name].rates}
    assert {(run.record["name"], run.record["lr"]) for run in runs} == expected
    assert {run.updates for run in runs} == {-(-2_000_000 // 4096)}
    assert len({option(run, "--seed") for run in runs}) == 1


def test_the_end_is_a_table_and_an_answer_of_the_pretraining_and_of_each_length(compare, plan):
    """Each at its best rate, which of the fine-tuning is the one on valid, over all seeds."""
    records = rows_of(plan.options.output)
    for row in records:
        if (row["name"], row["n"], row["lr"], row["seed"]) == ("roberta_prenorm", "2048", "0.0003", "2"):
            row["test_accuracy"] = "26"
    write_rows(plan.options.output, compare.COLUMNS, records)
    plan.options.seeds = [1, 2]
    printed = compare.report(plan)
    assert re.search(
        r"^flash_masked_lm +0.002 +1 +6.250 +better by 0.500 \(one seed\) +7.00 +3", printed, re.M
    )
    assert re.search(r"^roberta_prenorm +0.0003 +2 +18.0 \(10.0 to 26.0\)", printed, re.M)
    assert "0.0001" not in printed
    answers = [line for line in printed.splitlines() if line.startswith("In rows of")]
    assert answers == [
        "In rows of 512 tokens flash_masked_lm is better than roberta by 0.500 nats a masked token "
        "(perplexity 39.3 % lower; one seed, which proves nothing) and better than roberta_prenorm by 0.250 "
        "nats a masked token (perplexity 22.1 % lower; one seed, which proves nothing); all this on the "
        "whole split valid.",
        "In rows of 2048 tokens flash_masked_lm is worse than roberta_prenorm by 3.0 points of accuracy (not "
        "proven by 2 seeds, 95 % interval -41.1 to +35.1); all this on the whole split test; the best rate "
        "of flash_masked_lm, 0.0003, is at the edge of what was tried: another may be better; the best rate "
        "of roberta_prenorm, 0.0003, is at the edge of what was tried: another may be better.",
        answers[2],
    ]


def test_runs_and_systems_that_failed_are_named_in_the_answer(compare, plan):
    records = rows_of(plan.options.output)
    lost = dict(data=plan.fine_tuned.shared["data"], status="error: out of memory", valid_loss="")
    lost = tuned("roberta_prenorm", 512, "0.0003", 3, "", "") | lost
    records = [
        dict(row, status="ok", valid_loss="nan") if row["name"] == "roberta" else row for row in records
    ]
    write_rows(plan.options.output, compare.COLUMNS, [*records, lost])
    answers = [line for line in compare.report(plan).splitlines() if line.startswith("In rows of")]
    assert "split valid, without 1 of 4 runs, which failed (roberta)" in answers[0]
    assert "failed" not in answers[1]
    assert "split test, without 1 of 5 runs, which failed (roberta_prenorm)" in answers[2]


def test_pretraining_of_another_length_or_seed_is_another(compare, plan):
    assert plan.pretrained.finite()
    for changed in ({"row": 256}, {"seeds": [4]}):
        options = type(plan.options)(**{**vars(plan.options), **changed})
        assert not compare.Plan(options).pretrained.finite()


def test_the_part_that_was_evaluated_is_said(compare, plan):
    plan.options.valid_batches, plan.options.seeds = 5, [1, 2]
    printed = compare.report(plan)
    assert "all this on the first 5 batches of the split valid" in printed
    assert "all this on the first 5 batches of the split test" in printed


def test_repeated_positions_change_nothing_for_rows_of_the_learned_length(compare, data_bin, tmp_path):
    masked = ("--task", "masked_lm", "--criterion", "masked_lm", "--tokens-per-sample", "32")
    tools.call("train", data_bin, *ROBERTA, *masked, "--save-dir", tmp_path, "--max-update", "1")
    path = compare.with_more_positions(tmp_path / "checkpoint_last.pt", 32, 80)
    assert path.name == "checkpoint_last-positions80.pt"
    short, long = (
        checkpoint_utils.load_model_ensemble_and_task(
            [str(file)], arg_overrides={"data": str(data_bin), "max_positions": positions}
        )[0][0].eval()
        for file, positions in ((tmp_path / "checkpoint_last.pt", 32), (path, 80))
    )
    tokens = torch.randint(4, 50, (2, 80))
    with torch.no_grad():
        assert torch.equal(short(tokens[:, :32])[0], long(tokens[:, :32])[0])
        assert long(tokens)[0].isfinite().all()
    table = long.encoder.sentence_encoder.embed_positions.weight
    assert torch.equal(table[2:34], table[34:66])
    assert torch.equal(table[2:18], table[66:])


def test_a_mistake_on_the_command_line_is_named(compare, folders, tmp_path, capsys):
    (tmp_path / "classes" / "input0" / "dict.txt").write_text("a 1\n")
    mistakes = {
        "has another dictionary than --data": folders,
        "--max-tokens 100 is not allowed; allowed: 512 or more": [*folders, "--max-tokens", "100"],
        "--jobs 0 is not allowed": [*folders, "--jobs", "0"],
        "has no dict.txt": ["--data", str(tmp_path)],
        "has no input0/test.bin": [*folders[:3], str(tmp_path)],
    }
    for message, words in mistakes.items():
        with pytest.raises(SystemExit):
            compare.parse(words)
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_one_command_does_it_all_and_a_second_one_nothing(tmp_path):
    lines = tools.real_lines()
    tools.write_texts(tmp_path / "text", train=lines)
    scripts, parts = tools.REPOSITORY / "scripts", {"train": 0, "valid": 200, "test": 300}
    rows = ["split,label,file"]
    for label, begin in (("a", 0), ("b", 2000)):
        for split, offset in parts.items():
            tools.write_texts(tmp_path, **{f"{label}-{split}": lines[begin + offset : begin + offset + 100]})
            rows.append(f"{split},{label},{label}-{split}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    data, classes = ("--data", tmp_path / "lm"), tmp_path / "classes"
    table = ("--text", tmp_path, "--table", tmp_path / "table.csv", "--passage", 64)
    prepare = {
        "prepare_lm": ("--text", tmp_path / "text", "--output", tmp_path / "lm", "--vocab-size", 500),
        "prepare_classification": (*table, *data, "--output", classes),
    }
    for script, words in prepare.items():
        done = tools.run("python", scripts / f"{script}.py", *words)
        assert done.returncode == 0, done.stdout
    command = (
        *("python", SCRIPT, *data, "--classes", classes, "--device", "cpu", "--jobs", 2),
        *("--output", tmp_path / "rows.csv", "--folder", tmp_path / "work", "--systems", "flash_masked_lm"),
        *("roberta", "--pretraining-rates", "1e-3", "--rates", "1e-3", "--seeds", 1, 2, "--epochs", 1),
        *("--row", 32, "--passage", 64, "--tokens", 512, "--max-tokens", 256, "--batch-size", 16),
    )
    done = tools.run(*command)
    assert done.returncode == 0, done.stdout
    found = rows_of(tmp_path / "rows.csv")
    assert [row["status"] for row in found] == ["ok"] * 12
    counted = [(row["name"], row["n"]) for row in found if row["stage"] == "counts"]
    assert counted == [("naive_bayes", "64"), ("naive_bayes", "32")]
    found = [row for row in found if row["stage"] != "counts"]
    assert {(row["name"], row["stage"], row["n"]) for row in found} == {
        *((name, "pretraining", "32") for name in ("flash_masked_lm", "roberta")),
        *((name, "fine-tuning", n) for name in ("flash_masked_lm", "roberta") for n in ("64", "32")),
    }
    for row in found:
        assert float(row["valid_perplexity"] or 2) > 1
        assert 0 <= float(row["test_accuracy"] or 0) <= 100
        assert int(row["parameters"]) > 3e6
        data = "lm" if row["stage"] == "pretraining" else "classes"
        assert row["command"].startswith(f"fairseq-train {data} --task ")
        assert str(tmp_path) not in row["command"], "of this machine"
    before = (tmp_path / "rows.csv").read_bytes()
    again = tools.run(*command)
    assert again.returncode == 0, again.stdout
    assert (tmp_path / "rows.csv").read_bytes() == before
    reports = [run.stdout.partition("Pretraining:")[2] for run in (done, again)]
    assert len(re.findall(r"^In rows of ", reports[0], re.MULTILINE)) == 3
    assert len(re.findall(r"^Counts of tokens alone, in \d+ tokens, tell", reports[0], re.MULTILINE)) == 2
    assert reports[0] == reports[1]


def test_counts_of_tokens_alone_tell_what_naive_bayes_does(tmp_path):
    texts = {
        "train": ["a a b", "a c", "a b", "b b b"],
        "valid": ["a b b", "b a"],
        "test": ["a a a", "b b b", "c a c", "b b a"],
    }
    labels = {
        "train": ["one", "one", "one", "two"],
        "valid": ["two", "one"],
        "test": ["one", "two", "two", "two"],
    }
    tools.binarize(tmp_path, "input0", texts, "--padding-factor", "1")
    tools.binarize(tmp_path, "label", labels)
    # By hand, each of seven words counted once more than it was seen. Three tokens: a 5/16, b 3/16, c 2/16
    # and the end 3/16 in "one"; 1/10, 4/10, 1/10, 1/10 in "two". One token: 4/10, 1/10, 1/10; 1/8, 2/8, 1/8.
    # All times how often a label was there, 3/4 and 1/4, which decides what a single b tells.
    assert naive_bayes(tmp_path / "bin", 3) == {"valid": 50.0, "test": 50.0}
    assert naive_bayes(tmp_path / "bin", 1) == {"valid": 50.0, "test": 25.0}


def test_another_pooling_is_fine_tuned_in_rows_of_its_own(compare, plan):
    assert plan.fine_tuned.finite()
    plan.options.pooling = "mean"
    assert not compare.Plan(plan.options).fine_tuned.finite()
    words = ("data", "--arch", "roberta_prenorm", "--lr", "1")
    expected = ("data", "--arch", "pooled_roberta_prenorm", "--pooling", "mean", "--lr", "1")
    assert compare.with_pooling(words, "roberta", "mean") == expected
    assert compare.with_pooling(words, "roberta", "first") == words
    assert compare.with_pooling(words, "flash", "mean")[2:5] == ("roberta_prenorm", "--pooling", "mean")
