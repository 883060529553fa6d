"""Proves that the yardsticks give the known answers of models that copy, forget or know nothing."""

import math
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from fairseq import checkpoint_utils

import yardsticks
from fairseq_flash.modules import GatedAttentionUnit, align_rows
from fairseq_flash.ops import Options, Pair
from runs import reading
from support import tools
from support.tools import rows_of
from text.pieces import MODEL, learn_pieces

WORDS, SURE = 3000, 12.0
NOTHING = math.log(WORDS)
RIGHT = math.log1p((WORDS - 1) * math.exp(-SURE))
#: Losses are differences of numbers near 12, in float32: 2e-5 measured.
near = partial(pytest.approx, abs=1e3 * torch.finfo(torch.float32).eps)


class Copier:
    """Foresees what followed where the last ``suffix`` tokens stood before, up to ``reach`` tokens ago."""

    def __init__(self, reach, suffix=1):
        self.decoder = self
        self.reach, self.suffix = reach, suffix

    def extract_features(self, tokens):
        logits = torch.zeros(*tokens.shape, WORDS)
        for b, row in enumerate(tokens.tolist()):
            for i in range(len(row)):
                for j in range(i - 1, max(self.suffix - 2, i - self.reach - 1), -1):
                    if row[j - self.suffix + 1 : j + 1] == row[i - self.suffix + 1 : i + 1]:
                        logits[b, i, row[j + 1]] = SURE
                        break
        return logits, None

    def output_layer(self, features):
        return features


class Counter(Copier):
    """Foresees the number after each, from position ``reach`` of a row on."""

    def extract_features(self, tokens):
        known = torch.arange(tokens.shape[1]) >= self.reach
        return SURE * torch.nn.functional.one_hot(tokens + 1, WORDS) * known[:, None].float(), None


def reads(model):
    return lambda rows, **more: reading.scores(model, rows, "cpu", **more)


def text_of(tokens, **options):
    text = yardsticks.Text.__new__(yardsticks.Text)
    usual = dict(samples=3, split="test", passage=6, edges=[4, 16], contexts=[8, 32], seed=1)
    text.options, text.tokens = Namespace(**{**usual, **options}), tokens
    return text


def only(rows):
    (row,) = rows
    return row


def test_a_distance_is_that_of_the_last_occurrence_in_the_row():
    rows = torch.randint(0, 6, (5, 41), generator=torch.Generator().manual_seed(1))
    for row, found in zip(rows.tolist(), yardsticks.distances(rows).tolist(), strict=True):
        for i, distance in enumerate(found, start=1):
            before = [j for j in range(i) if row[j] == row[i]]
            assert distance == (i - before[-1] if before else 0)


def test_recurrence_tells_how_far_back_a_model_reads():
    tokens = torch.tensor([4, 4, *range(5, 15), *range(5, 15), *range(1000, 1020)] * 3 + [4])
    text = text_of(tokens)
    found = list(yardsticks.measure_recurrence(text, 42, reads(Copier(5)), reads(Copier(30))))
    by_class = {row["x"]: row for row in found}
    assert list(by_class) == ["1-3", "4-15", "16-42", "new", "all"]
    assert [row["tokens"] for row in found] == [3, 30, 3, 90, 126]
    # Nine of each ten come behind a token that has been there, ten tokens ago; the first has none to tell it.
    assert by_class["4-15"]["loss"] == near(NOTHING)
    assert by_class["4-15"]["gain"] == near(0.9 * (RIGHT - NOTHING))
    whole = sum(row["loss"] * row["tokens"] for x, row in by_class.items() if x != "all")
    assert by_class["all"]["loss"] == near(whole / 126)


@pytest.mark.parametrize(("distance", "found"), [(6, True), (20, True), (21, False), (40, False)])
def test_a_copy_is_recognised_as_far_as_the_model_reads(distance, found):
    text = text_of(torch.arange(10, 400))
    row = only(yardsticks.measure_copy(text, distance, reads(Copier(20)), None))
    assert row["loss"] == near(RIGHT if found else NOTHING)
    assert row["gain"] == near(NOTHING - RIGHT if found else 0)
    assert (row["n"], row["tokens"]) == (distance + 6, 3 * 5)


def test_a_second_copy_overlaps_no_first_one():
    with pytest.raises(ValueError, match="--distances 5 is not allowed with --passage 6"):
        list(yardsticks.measure_copy(text_of(torch.arange(100)), 5, reads(Copier(1)), None))


def test_the_context_changes_and_the_last_tokens_do_not():
    text, model = text_of(torch.arange(10, 200)), Counter(24)
    assert only(yardsticks.measure_context(text, 8, reads(model), None)) == near(
        dict(n=8, tokens=24, loss=NOTHING, gain=0)
    )
    row = only(yardsticks.measure_context(text, 32, reads(model), None))
    assert row == near(dict(n=32, tokens=24, loss=RIGHT, gain=NOTHING - RIGHT))


def test_a_text_that_is_too_short_is_named():
    for measure in (yardsticks.measure_copy, yardsticks.measure_context, yardsticks.measure_recurrence):
        with pytest.raises(ValueError, match="--split test has 30 tokens; needed"):
            list(measure(text_of(torch.arange(30)), 31, reads(Copier(1)), None))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with a sentencepiece model."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(tools.real_lines()[:2000]), encoding="utf-8")
    learn_pieces([folder / "text"], 600, 1, folder / MODEL, folder / "dict.txt")
    return folder


def test_a_passkey_is_found_by_a_copy_of_what_stood_behind_the_same_words(pieces):
    text = text_of(torch.arange(1000, 1400), data=pieces)
    row = only(yardsticks.measure_passkey(text, 90, reads(Copier(200, suffix=3)), None))
    assert row["accuracy"] == 1
    for model in (Copier(60, suffix=3), Counter(0)):
        row = only(yardsticks.measure_passkey(text, 90, reads(model), None))
        assert row["accuracy"] == 0
        assert row["loss"] >= NOTHING - 1e-3


def test_a_passkey_row_tells_and_asks_for_the_same_number_that_far_apart(pieces):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / MODEL))
    (row, answer), (other, _) = yardsticks.passkeys([torch.full((80,), 7)] * 2, processor, 1)
    key = processor.decode(row[-answer:].tolist())
    assert len(key.split()) == 5
    assert processor.decode(row[: row.tolist().index(2)].tolist()) == f"The pass key is {key}. Remember it."
    assert processor.decode(row[80:].tolist()) == f"What is the pass key? The pass key is {key}"
    assert row[-answer:].tolist() != other[-answer:].tolist()


def test_a_checkpoint_gets_its_rows_once_and_a_failure_is_a_row(
    data_bin, checkpoint, second_checkpoint, tmp_path
):
    output = tmp_path / "yardsticks.csv"
    words = [
        "--data",
        data_bin,
        "--checkpoints",
        checkpoint,
        "--against",
        second_checkpoint,
        "--split",
        "valid",
    ]
    words += ["--device", "cpu", "--row", 32, "--edges", 8, "--distances", 16, 9999, "--contexts", 8, 24]
    words = [*map(str, [*words, "--passage", 4, "--samples", 3, "--output", output])]
    yardsticks.main(words)
    rows, before = rows_of(output), output.read_bytes()
    cells = [(row["yardstick"], row["value"], row["x"]) for row in rows]
    expected = [("recurrence", "32", x) for x in ("1-7", "8-32", "new", "all")]
    expected += [
        ("copy", "16", "16"),
        ("copy", "9999", "9999"),
        ("context", "8", "8"),
        ("context", "24", "24"),
    ]
    assert cells == [*expected, ("passkey", "16", "16"), ("passkey", "9999", "9999")]
    short, *asked = [row["status"] for row in rows if row["status"] != "ok"]
    assert short.startswith("error: --split valid has")
    assert len(asked) == 2
    assert all("has no sentencepiece.bpe.model" in status for status in asked)
    tokens, _ = reading.read_tokens(data_bin, "valid")
    count = (len(tokens) - 1) // 32 * 32
    losses = []
    for path in (checkpoint, second_checkpoint):
        (model,), *_ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
        with torch.no_grad():
            logits = model.eval()(tokens[:count].view(-1, 32).long())[0].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[1 : count + 1].long()).item())
    assert float(rows[3]["loss"]) == near(losses[0], abs=2e-5)
    assert float(rows[3]["gain"]) == near(losses[1] - losses[0], abs=3e-5)
    yardsticks.main(words)
    assert output.read_bytes() == before


@pytest.mark.parametrize("norm", ["mean", "fading"])
@pytest.mark.parametrize("lengths", [None, [45, 19]])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_a_windowed_branch_reads_the_last_chunks_alone(heads, lengths, norm):
    q, k, v = torch.randn(
        3, 2, *heads, 45, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    attend = reading.Windowed(Options(8, True, norm, branches=("lin",)), window=2)
    rows = SimpleNamespace(lengths=lengths and torch.tensor(lengths))
    out, _ = attend((None, Pair(q, k)), v, None, rows, None, False)
    chunk = torch.arange(45) // 8
    back = chunk[:, None] - chunk[None, :]
    # A fading mean forgets each of four columns at a pace of its own: half in 1 to 16 chunks.
    kept = [0.5 ** (1 / 16 ** (column / 3)) if norm == "fading" else 1.0 for column in range(4)]
    columns = []
    for column, share in enumerate(kept):
        seen = ((back > 0) & (back <= 2)) * share ** (back.double() - 1)
        weights = (q @ k.mT) * seen / seen.sum(-1, keepdim=True).clamp(min=1)
        columns.append(weights @ v[..., column : column + 1])
    expected = torch.cat(columns, dim=-1)
    for b, length in enumerate(lengths or [45, 45]):
        torch.testing.assert_close(out[b, ..., :length, :], expected[b, ..., :length, :])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "arch", ["flash_lm_tiny", "flash2_lm_tiny", "flash_global_lm_tiny", "mc_transformer_pp_lm_tiny"]
)
def test_a_window_over_everything_changes_nothing_and_a_narrow_one_does(data_bin, tmp_path, arch, plain):
    small = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16", "--chunk-size", "8")
    tools.train(data_bin, tmp_path, "--arch", arch, *small, updates=2)
    (model,), *_ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "checkpoint_last.pt")])
    model.double().eval()
    if plain and arch.startswith("mc"):
        with pytest.raises(ValueError, match="--plain-linear needs a model with gated attention units"):
            reading.change_reading(model, None, plain)
        return
    rows = torch.randint(4, 100, (2, 45))
    before = model.decoder.extract_features(rows)[0]
    reading.change_reading(model, 100, plain)
    wide = model.decoder.extract_features(rows)[0]
    assert torch.allclose(wide, before, rtol=1e-12, atol=1e-12) != plain
    reading.change_reading(model, 2, plain)
    narrow = model.decoder.extract_features(rows)[0]
    torch.testing.assert_close(narrow[:, :24], wide[:, :24])
    assert not torch.allclose(narrow[:, 24:], wide[:, 24:])


def fading_unit(shift_keys=True):
    """A unit of the linear branch alone, and a model of it."""
    sizes = dict(attention="global", attention_dim=8, chunk_size=4)
    unit = GatedAttentionUnit(16, **sizes, shift_keys=shift_keys, linear_norm="fading").double().eval()
    return unit, SimpleNamespace(decoder=SimpleNamespace(stack=SimpleNamespace(blocks=[unit])))


@pytest.mark.parametrize("shift_keys", [False, True])
def test_a_plain_branch_reads_as_if_all_tokens_stood_at_position_zero(shift_keys):
    unit, model = fading_unit(shift_keys)
    x, rows = align_rows(torch.randn(2, 13, 16, dtype=torch.float64), None, None, 8, torch.float64)
    nowhere = rows._replace(cos=torch.ones_like(rows.cos), sin=torch.zeros_like(rows.sin))
    expected, turned = unit(x, rows=nowhere)[0], unit(x, rows=rows)[0]
    reading.change_reading(model, None, True)
    torch.testing.assert_close(unit(x, rows=rows)[0], expected)
    assert not torch.allclose(turned, expected)


def test_a_reading_that_a_model_cannot_do_is_refused_by_name():
    for model, window, plain, option in (
        (SimpleNamespace(decoder=SimpleNamespace()), 2, False, "--linear-window"),
        (SimpleNamespace(decoder=SimpleNamespace()), None, True, "--plain-linear"),
    ):
        with pytest.raises(ValueError, match=f"{option} needs a model with"):
            reading.change_reading(model, window, plain)
