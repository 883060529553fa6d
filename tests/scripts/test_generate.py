"""Proves that generate.py streams the text of fairseq-generate, and reads a long context only once."""

import io
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fairseq.data import Dictionary

from support import tools

SCRIPT = tools.REPOSITORY / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def generate():
    """The script as a module."""
    return tools.load_script("generate")


@pytest.fixture(scope="module")
def varied(checkpoint):
    """A checkpoint that writes more than one word."""
    return tools.perturbed(checkpoint, 1)


@pytest.fixture
def stream(generate, varied, data_bin, capsys):
    """Runs the script on the trained checkpoint: what it wrote, less the line end that closes it."""

    def run(*arguments, status=0):
        assert generate.main([str(varied), "--data", str(data_bin), "--cpu", *map(str, arguments)]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out.removesuffix("\n")

    return run


@pytest.mark.parametrize("task", ["language_modeling", "flash_language_modeling"])
def test_greedy_text_is_that_of_fairseq_generate(stream, data_bin, varied, task):
    base = (data_bin, "--user-dir", tools.USER_DIR, "--path", varied, "--cpu", "--task", task)
    base += ("--gen-subset", "test", "--sample-break-mode", "eos", "--num-workers", "0", "--prefix-size", "3")
    output = tools.call("generate", *base, "--beam", "1", "--max-len-b", "33")
    found = tools.rows(output, "H")
    words = set()
    for number in sorted(found)[:6]:
        written = found[number][0][-1].split()
        prompt, rest = " ".join(written[:3]), " ".join(written[3:])
        for greedy in (["--greedy"], ["--temperature", "0"]):
            text = stream("--prompt", prompt, *greedy, "--stop", "line", "--tokens", "30")
            assert text.removeprefix(" ") == rest
        words.update(written[3:])
    assert len(words) > 3, "a text of one word would prove little"


def test_without_a_prompt_the_text_is_that_of_fairseq_interactive(stream, data_bin, varied):
    base = ("--user-dir", tools.USER_DIR, "--path", varied, "--task", "language_modeling", "--beam", "1")
    output = tools.run("fairseq-interactive", data_bin, *base, "--max-len-b", "9", stdin="\n").stdout
    expected = tools.rows(output, "H")["0"][0][-1]
    assert stream("--prompt", "", "--greedy", "--stop", "line", "--tokens", "9") == expected


def test_text_appears_token_by_token(generate, monkeypatch, varied, data_bin):
    class Watched(io.StringIO):
        flushes = 0

        def flush(self):
            self.flushes += 1

    watched = Watched()
    monkeypatch.setattr(sys, "stdout", watched)
    words = [
        str(varied),
        "--data",
        str(data_bin),
        "--cpu",
        "--prompt",
        "the",
        "--tokens",
        "12",
        "--stop",
        "never",
    ]
    assert generate.main(words) == 0
    assert watched.flushes >= 12


def test_a_seed_repeats_the_text_and_another_changes_it(stream):
    options = ("--prompt", "the value", "--tokens", "30", "--top-k", "20", "--stop", "never")
    first = stream(*options, "--seed", "3")
    assert stream(*options, "--seed", "3") == first
    assert stream(*options, "--seed", "4") != first


def test_one_candidate_is_the_greedy_choice(stream):
    options = ("--prompt", "the value", "--tokens", "20")
    greedy = stream(*options, "--greedy")
    assert stream(*options, "--top-k", "1") == greedy
    assert stream(*options, "--top-p", "1e-6") == greedy


def test_a_text_without_a_prompt_does_not_end_before_it_begins(generate):
    words = Dictionary()
    words.add_symbol("a")
    log_probs = torch.full((1, len(words)), -9.0)
    log_probs[:, words.eos()], log_probs[:, words.pad()] = -1.0, 0.0
    for way in (["--greedy"], ["--top-k", "1"], ["--top-p", "0.1"]):
        options = generate.parse(["checkpoint", "--prompt", "", *way])
        choose = generate.chooser(words, options, first=True)
        assert choose(log_probs.clone()) not in (words.eos(), words.pad())
        assert choose(log_probs.clone()) == words.eos()


def test_a_saved_state_stands_for_its_prompt(stream, tmp_path):
    prompt, more = "the value of the object is not a class , and " * 20, "the name of it"
    whole = stream("--prompt", prompt + more, "--greedy", "--tokens", "25", "--stop", "never")
    assert stream("--prompt", prompt, "--save-state", tmp_path / "state.pt", "--tokens", "0") == ""
    load = ("--load-state", tmp_path / "state.pt", "--greedy", "--tokens", "25", "--stop", "never")
    assert stream("--prompt", more, *load) == whole
    straight = stream("--prompt", prompt, "--greedy", "--tokens", "25", "--stop", "never")
    assert stream("--prompt", "", *load) == straight


def test_the_state_file_has_one_size_whatever_the_prompt(stream, tmp_path):
    for words in (3, 400):
        stream("--prompt", "the value " * words, "--save-state", tmp_path / f"{words:03}.pt", "--tokens", "0")
    sizes = {path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) == 1


def test_a_state_of_other_weights_is_refused(stream, generate, checkpoint, data_bin, tmp_path):
    words = [
        str(tools.perturbed(checkpoint, 2)),
        "--data",
        str(data_bin),
        "--cpu",
        "--prompt",
        "a",
        "--tokens",
        "0",
    ]
    assert generate.main([*words, "--save-state", str(tmp_path / "other.pt")]) == 0
    error = stream("--prompt", "a", "--load-state", tmp_path / "other.pt", status=2)
    assert "saved with other weights" in error


def test_a_state_file_that_is_none_is_refused(stream, generate, tmp_path):
    missing = stream("--prompt", "a", "--load-state", tmp_path / "none.pt", status=2)
    assert "does not exist" in missing
    (tmp_path / "text.pt").write_text("no state")
    assert "cannot be read" in stream("--prompt", "a", "--load-state", tmp_path / "text.pt", status=2)
    for content in ({"format": "something"}, {"format": generate.STATE_FORMAT}, [1]):
        torch.save(content, tmp_path / "other.pt")
        assert "not a state" in stream("--prompt", "a", "--load-state", tmp_path / "other.pt", status=2)


def test_a_state_file_runs_no_code(stream, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save(Harm(), tmp_path / "harmful.pt")
    assert "cannot be read" in stream("--prompt", "a", "--load-state", tmp_path / "harmful.pt", status=2)
    assert not (tmp_path / "harm").exists()


def test_a_state_of_other_shapes_is_refused(stream, tmp_path):
    path = tmp_path / "state.pt"
    stream("--prompt", "the value", "--save-state", path, "--tokens", "0")
    content = torch.load(path, weights_only=True)
    content["layers"][1]["v"] = content["layers"][1]["v"][:, :-1]
    torch.save(content, path)
    assert "does not fit layer 1 of this model: v" in stream("--prompt", "a", "--load-state", path, status=2)


def test_what_is_missing_is_named(generate, data_bin, tmp_path, capsys, checkpoint):
    assert generate.main([str(tmp_path), "--prompt", "a"]) == 2
    assert "checkpoint_best.pt" in capsys.readouterr().err
    shutil.copy(checkpoint, tmp_path / "checkpoint_last.pt")
    assert generate.main([str(tmp_path), "--prompt", "a"]) == 2
    assert "dict.txt" in capsys.readouterr().err
    shutil.copy(data_bin / "dict.txt", tmp_path)
    assert generate.main([str(tmp_path), "--prompt", "the", "--tokens", "3", "--cpu"]) == 0


def streamed(generate, symbols, **options):
    words = Dictionary()
    indices = [words.eos() if symbol == "</s>" else words.add_symbol(symbol) for symbol in symbols]
    text = generate.StreamedText(words, True, **options)
    return [text.add(index) for index in indices]


def test_pieces_become_text_and_bytes_become_characters(generate):
    space = "\u2581"
    pieces = [f"{space}The", f"{space}va", "lue", "<0xC3>", "<0xA9>", f"{space}x", "</s>", f"{space}So"]
    expected = ["The", " va", "lue", "", "é", " x", "\n", "So"]
    assert streamed(generate, pieces, at_line_start=True) == expected
    assert streamed(generate, pieces, at_line_start=False) == [" The", *expected[1:]]


def test_bytes_that_make_no_character_are_shown_as_such(generate):
    assert (
        "".join(streamed(generate, ["<0xC3>", "a", "<0xE2>", "</s>"], at_line_start=True))
        == "\ufffda\ufffd\n"
    )


def test_a_prompt_is_split_as_the_data_was(generate, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    words = sorted(set(re.findall(r"\w+", " ".join(tools.real_lines()[:400]))))
    (tmp_path / "text").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    dictionary = Dictionary()
    for index in range(model.get_piece_size()):
        dictionary.add_symbol(model.id_to_piece(index))
    tokens = generate.encode("the value\n\nof a", dictionary, tmp_path / "m.model")
    eos, unknown = dictionary.eos(), dictionary.unk()
    assert unknown not in tokens
    assert tokens.count(eos) == 2
    text = generate.StreamedText(dictionary, True, at_line_start=True)
    assert "".join(map(text.add, tokens)) == "the value\n\nof a"
    assert generate.encode("", dictionary, tmp_path / "m.model") == []


def endless(checkpoint, data_bin):
    """The command that writes until it is stopped."""
    options = ("--data", data_bin, "--cpu", "--prompt", "the", "--stop", "never")
    return [sys.executable, SCRIPT, checkpoint, *options]


def test_an_interrupt_ends_it_without_a_traceback(checkpoint, data_bin):
    words = endless(checkpoint, data_bin)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, words), "--tokens", "1000000"], **pipes)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_ends_it_quietly(checkpoint, data_bin):
    words = endless(checkpoint, data_bin)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*map(str, words), "--tokens", "1000000"], **pipes)
    assert process.stdout.read(20)
    process.stdout.close()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.returncode == 0
    assert b"Traceback" not in process.stderr.read()
