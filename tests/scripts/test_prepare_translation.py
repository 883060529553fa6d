"""Proves that prepare_translation.py turns parallel text into exact fairseq data, pair by pair."""

import gzip
import json
import lzma
import random
import shutil

import pytest
import sentencepiece
from fairseq.data import Dictionary, data_utils

import prepare_translation
from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq
from support import tools

ENDS = ("", "der", "lé")
WORDS = [a + b + c for a in ("ri", "sto", "wal", "un") for b in ("ver", "ne", "king") for c in ENDS]
LANGUAGES = ("aa", "bb")
SPECIAL = ("a rare ☃ and a tab\there and   spaces \u3000 ﬁne… <pad> </s> <unk>", "\u2028 a separator \x85")


def sentences(count, seed=0):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(4, 12))) + "." for _ in range(count)]


def write_corpus(folder, train=None):
    """Files of both languages: the second is the first backwards; returns the arguments that name them."""
    texts = {"train": train or [*SPECIAL, "", *sentences(250)], "val": ["", *sentences(20, 1)]}
    texts["test"] = [*sentences(9, 2), "", SPECIAL[0]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        (folder / f"{name}.aa").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{name}.bb").write_text("".join(f"{line[::-1]}\n" for line in lines))
    names = ("--train", folder / "train", "--valid", folder / "val", "--test", folder / "test")
    return ["--source-lang", "aa", "--target-lang", "bb", *names], texts


def run(*arguments):
    """Runs the command line in this process."""
    prepare_translation.main([str(argument) for argument in arguments])


def refuse(capsys, *arguments) -> str:
    """The one line with which the command line ends."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in message
    return message


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(data, split, language, model="sentencepiece.bpe.model"):
    """The text of a split, read back from the binary data with fairseq's own classes."""
    dictionary = Dictionary.load(str(data / f"dict.{language}.txt"))
    dataset = data_utils.load_indexed_dataset(str(data / f"{split}.aa-bb.{language}"), dictionary)
    assert not any((line == dictionary.unk()).any() for line in dataset)
    assert all(line[-1] == dictionary.eos() for line in dataset)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / model))
    return [processor.decode([dictionary[i] for i in line[:-1]]) for line in dataset]


def clean(lines):
    return [" ".join(line.split()) for line in lines]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The arguments that name a corpus, its texts, and the data made from it."""
    folder = tmp_path_factory.mktemp("a corpus")
    arguments, texts = write_corpus(folder / "text")
    run(*arguments, "--output", folder / "data", "--vocab-size", 340, "--workers", 1)
    return arguments, texts, folder / "data"


def test_the_data_hold_the_pairs_and_nothing_else(corpus):
    _, texts, data = corpus
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        lines = [line for line in texts[name] if line or split != "train"]
        assert decoded(data, split, "aa") == clean(lines)
        assert decoded(data, split, "bb") == clean(line[::-1] for line in lines)
    assert set(content(data)) == {
        *("dict.aa.txt", "dict.bb.txt", "prepare.json", "sentencepiece.bpe.model"),
        *("test.raw.aa", "test.raw.bb"),
        *(
            f"{split}.aa-bb.{language}.{end}"
            for split in ("train", "valid", "test")
            for language in LANGUAGES
            for end in ("bin", "idx")
        ),
    }


def test_the_record_counts_what_the_data_hold_and_what_was_dropped(corpus):
    _, _, data = corpus
    splits = json.loads((data / "prepare.json").read_text())["splits"]
    assert [splits[split]["dropped"] for split in ("train", "valid", "test")] == [1, 0, 0]
    for split, counts in splits.items():
        for language in LANGUAGES:
            lines = decoded(data, split, language)
            assert counts["pairs"] == len(lines)
            assert counts[language]["words"] == sum(len(line.split()) for line in lines)
            assert counts[language]["bytes"] == sum(len(line.encode()) + 1 for line in lines)
            size = (data / f"{split}.aa-bb.{language}.bin").stat().st_size
            assert counts[language]["tokens"] == size // 2


def test_the_vocabulary_is_one_for_both_languages(corpus):
    _, _, data = corpus
    assert len(Dictionary.load(str(data / "dict.aa.txt"))) == 340
    assert content(data)["dict.aa.txt"] == content(data)["dict.bb.txt"]


def test_the_reference_has_the_lines_of_the_test_split(corpus):
    _, texts, data = corpus
    expected = clean(line[::-1] for line in texts["test"])
    assert (data / "test.raw.bb").read_text().split("\n") == [*expected, ""]


def test_compressed_files_give_the_same_bytes_with_any_number_of_workers(corpus, tmp_path):
    arguments, _, data = corpus
    arguments = [str(argument).replace(str(data.parent / "text"), str(tmp_path)) for argument in arguments]
    for path in (data.parent / "text").iterdir():
        pack = {"aa": (gzip.compress, ".gz"), "bb": (lzma.compress, ".xz")}[path.suffix[1:]]
        (tmp_path / f"{path.name}{pack[1]}").write_bytes(pack[0](path.read_bytes()))
    run(*arguments, "--output", tmp_path / "again", "--vocab-size", 340, "--workers", 3)
    found, expected = content(tmp_path / "again"), content(data)
    # The record knows the files by their names.
    del found["prepare.json"], expected["prepare.json"]
    assert found == expected


def test_a_second_run_reuses_the_data_and_another_corpus_is_not_overwritten_unasked(corpus, tmp_path, capsys):
    arguments, _, data = corpus
    before = content(data)
    run(*arguments, "--output", data, "--vocab-size", 340)
    assert "already prepared" in capsys.readouterr().out
    for other in (["--vocab-size", 350], ["--vocab-size", 340, "--separate"]):
        assert "--overwrite" in refuse(capsys, *arguments, "--output", data, *other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        assert "--output" in refuse(capsys, *arguments, "--output", tmp_path / "mine", *more)
    assert content(data) == before
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train.aa-bb.aa.bin").write_bytes(b"cut")
    assert "damaged" in refuse(capsys, *arguments, "--output", tmp_path / "data", "--vocab-size", 340)


def test_overwriting_with_separate_vocabularies_replaces_everything(corpus, tmp_path):
    arguments, texts, data = corpus
    shutil.copytree(data, tmp_path / "data")
    run(*arguments, "--output", tmp_path / "data", "--vocab-size", 310, "--separate", "--overwrite")
    for language, model in (("aa", "sentencepiece.bpe.model"), ("bb", "sentencepiece.bb.model")):
        lines = texts["test"] if language == "aa" else [line[::-1] for line in texts["test"]]
        assert decoded(tmp_path / "data", "test", language, model) == clean(lines)
        assert len(Dictionary.load(str(tmp_path / "data" / f"dict.{language}.txt"))) == 310
    assert content(tmp_path / "data")["dict.aa.txt"] != content(tmp_path / "data")["dict.bb.txt"]


def test_several_training_prefixes_are_one_text(corpus, tmp_path):
    arguments, texts, _ = corpus
    more, _ = write_corpus(tmp_path / "more", train=sentences(60, seed=7))
    place = arguments.index("--train") + 2
    arguments = [*arguments[:place], more[more.index("--train") + 1], *arguments[place:]]
    run(*arguments, "--output", tmp_path / "data", "--vocab-size", 340)
    lines = [line for line in texts["train"] if line] + sentences(60, seed=7)
    assert decoded(tmp_path / "data", "train", "aa") == clean(lines)


BAD = {
    "a file that is missing": (dict(remove="val.bb"), [], "none of these files exists: "),
    "a file that is there twice": (dict(add="val.bb.gz"), [], "of which one is needed"),
    "files of different lengths": (dict(shorten="train.bb"), [], "there are 253 in "),
    "a longer target": (dict(shorten="test.aa"), [], "as many lines in both files; there are 10 in "),
    "an empty split": (dict(empty="test"), [], "there is no pair of lines in it"),
    "a file that is not UTF-8": (dict(latin="train.aa"), [], "not UTF-8 at byte"),
    "a language with a hyphen": ({}, ["--source-lang", "a-b"], "--source-lang 'a-b' is not allowed"),
    "one language": ({}, ["--target-lang", "aa"], "they must differ"),
    "a vocabulary too large": ({}, ["--vocab-size", "8000"], "at most"),
    "a vocabulary too small": ({}, ["--vocab-size", "30"], "at least"),
    "no vocabulary": ({}, ["--vocab-size", "0"], "--vocab-size 0 must be at least 1"),
    "no workers": ({}, ["--workers", "0"], "--workers 0 must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_gets_one_clear_sentence(tmp_path, capsys, case):
    spoilt, more, expected = BAD[case]
    arguments, _ = write_corpus(tmp_path / "text")
    for how, name in spoilt.items():
        path = tmp_path / "text" / name
        if how == "remove":
            path.unlink()
        elif how == "add":
            path.write_bytes(gzip.compress(b"one\n"))
        elif how == "shorten":
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        elif how == "empty":
            for language in LANGUAGES:
                path.with_name(f"{name}.{language}").write_text("")
        elif how == "latin":
            path.write_bytes(b"\xe9\n" * 253)
    assert expected in refuse(capsys, *arguments, "--output", tmp_path / "data", *more)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "data.partial").exists()


def test_what_is_prepared_trains_and_raw_text_is_translated(corpus, tmp_path):
    """By fairseq's own tools and by the hub interface, with no word about pieces but their model."""
    _, _, data = corpus
    sizes = ("--embed-dim", 32, "--encoder-layers", 1, "--decoder-layers", 1, "--attention-dim", 16)
    recipe = ("--optimizer", "adam", "--lr", 0.003, "--batch-size", 16, "--max-update", 2, "--cpu")
    model = ("--arch", "flash_seq2seq_tiny", "--share-all-embeddings", *sizes, *recipe)
    words = (data, "--user-dir", tools.USER_DIR, "--task", "translation", *model, "--save-dir", tmp_path)
    tools.call("train", *words, "--no-epoch-checkpoints", "--num-workers", 0)
    hub = FlashSeq2Seq.from_pretrained(
        *(str(tmp_path), "checkpoint_last.pt", str(data)),
        bpe="sentencepiece",
        sentencepiece_model=str(data / "sentencepiece.bpe.model"),
    )
    sources = ["river storne walking.", "", "unheard of ☃"]
    translations = hub.translate(sources, beam=2, max_len_b=9)
    assert len(translations) == 3
    assert not any("▁" in translation for translation in translations)
    (tmp_path / "input").write_text("".join(f"{source}\n" for source in sources))
    output = tools.call(
        *("interactive", data, "--user-dir", tools.USER_DIR, "--path", tmp_path / "checkpoint_last.pt"),
        *("--cpu", "--bpe", "sentencepiece", "--sentencepiece-model", data / "sentencepiece.bpe.model"),
        *("--beam", 2, "--max-len-b", 9, "--input", tmp_path / "input"),
    )
    printed = [tools.rows(output, "D")[str(number)][0][1] for number in range(3)]
    assert printed == translations
