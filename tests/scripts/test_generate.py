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

from fairseq_flash.generation import Choice, Reader, StreamedText, encode
from fairseq_flash.generation.model import fingerprint, load_model
from support import tools

SCRIPT = tools.REPOSITORY / "scripts" / "generate.py"
OLD_FORMAT = "fairseq_flash decoding state 1"
#: Of tests/data/flash_lm_v1.pt, as the command reckoned it when states had the old format.
FINGERPRINT = "05279095c84155229feb3b0555d81813ac22a27f5ee7395e566bb256b2a98bd0"


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
        words = [str(varied), "--data", str(data_bin), "--cpu", *map(str, arguments)]
        try:
            found = generate.main(words)
        except SystemExit as ended:
            found = ended.code
        captured = capsys.readouterr()
        assert found == status, captured.err
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


def test_a_text_without_a_prompt_does_not_end_before_it_begins():
    words = Dictionary()
    words.add_symbol("a")
    log_probs = torch.full((1, len(words)), -9.0)
    log_probs[:, words.eos()], log_probs[:, words.pad()] = -1.0, 0.0
    for way in ({"greedy": True}, {"top_k": 1}, {"top_p": 0.1}):
        choose = Choice(words, first=True, **way)
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


def test_a_state_file_that_is_none_is_refused(stream, tmp_path):
    missing = stream("--prompt", "a", "--load-state", tmp_path / "none.pt", status=2)
    assert "does not exist" in missing
    (tmp_path / "text.pt").write_text("no state")
    assert "cannot be read" in stream("--prompt", "a", "--load-state", tmp_path / "text.pt", status=2)
    for content in ({"format": "something"}, {"format": OLD_FORMAT}, [1]):
        torch.save(content, tmp_path / "other.pt")
        error = stream("--prompt", "a", "--load-state", tmp_path / "other.pt", status=2)
        assert "holds something else; allowed: " in error
        assert error.count("\n") == 1


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
    error = stream("--prompt", "a", "--load-state", path, status=2)
    assert "does not fit this stack: state, layer 1: v has shape" in error


def test_what_is_missing_is_named(generate, data_bin, tmp_path, capsys, checkpoint):
    assert generate.main([str(tmp_path), "--prompt", "a"]) == 2
    assert "checkpoint_best.pt" in capsys.readouterr().err
    shutil.copy(checkpoint, tmp_path / "checkpoint_last.pt")
    assert generate.main([str(tmp_path), "--prompt", "a"]) == 2
    assert "dict.txt" in capsys.readouterr().err
    shutil.copy(data_bin / "dict.txt", tmp_path)
    assert generate.main([str(tmp_path), "--prompt", "the", "--tokens", "3", "--cpu"]) == 0


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--top-k", "0", "1 or more"),
        ("--top-k", "-1", "1 or more"),
        ("--top-k", "1.5", "1 or more"),
        ("--top-k", "99999", "1 to "),
        ("--top-p", "1.5", "above 0, up to 1"),
        ("--top-p", "0", "above 0, up to 1"),
        ("--top-p", "-1", "above 0, up to 1"),
        ("--top-p", "nan", "above 0, up to 1"),
        ("--temperature", "nan", "0, or 1e-06 or more"),
        ("--temperature", "inf", "0, or 1e-06 or more"),
        ("--temperature", "-1", "0, or 1e-06 or more"),
        ("--temperature", "1e-300", "0, or 1e-06 or more"),
        ("--temperature", "warm", "0, or 1e-06 or more"),
        ("--tokens", "-1", "0 to 1073741824"),
        ("--tokens", str(10**12), "0 to 1073741824"),
        ("--tokens", "9" * 5000, "0 to 1073741824"),
        ("--seed", str(2**70), "0 to 2**63 - 1"),
        ("--seed", "-1", "0 to 2**63 - 1"),
        ("--save-state", "no/such/folder/state.pt", "a file in a folder that exists"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(stream, option, value, allowed):
    error = stream("--prompt", "the", f"{option}={value}", status=2)
    last = error.splitlines()[-1]
    assert f"{option}" in last
    assert f"allowed: {allowed}" in last


def test_two_ways_to_draw_exclude_each_other(stream):
    error = stream("--prompt", "the", "--top-k", "3", "--top-p", "0.5", status=2)
    assert "not allowed with argument" in error


def hostile_files(checkpoint):
    """Contents that are no checkpoint of ours, by name."""
    whole = checkpoint.read_bytes()
    content = torch.load(checkpoint, weights_only=False)
    yield "empty", b""
    yield "text", b"a text\n" * 40
    yield "cut", whole[: len(whole) // 2]
    middle = len(whole) // 2
    yield "flipped", whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    changed = {
        "list": [1],
        "no configuration": {"model": content["model"]},
        "NaN": {
            **content,
            "model": {k: v * torch.nan if v.is_floating_point() else v for k, v in content["model"].items()},
        },
        "no weights": {**content, "model": {}},
        "another shape": {
            **content,
            "model": {k: v[..., :-1] if v.dim() > 1 else v for k, v in content["model"].items()},
        },
    }
    for name, wrong in changed.items():
        file = io.BytesIO()
        torch.save(wrong, file)
        yield name, file.getvalue()


def test_a_malformed_checkpoint_is_one_clear_sentence(generate, checkpoint, data_bin, tmp_path, capsys):
    for name, content in hostile_files(checkpoint):
        path = tmp_path / "hostile.pt"
        path.write_bytes(content)
        assert generate.main([str(path), "--data", str(data_bin), "--cpu", "--prompt", "the"]) == 2, name
        captured = capsys.readouterr()
        assert str(path) in captured.err, name
        assert "weights_only" not in captured.err, name
        assert captured.err.count("\n") == 1, (name, captured.err)
        assert not captured.out, name


def test_a_dictionary_that_does_not_fit_is_one_clear_sentence(generate, checkpoint, tmp_path, capsys):
    (tmp_path / "dict.txt").write_text("one 1\ntwo 1\n")
    assert generate.main([str(checkpoint), "--data", str(tmp_path), "--cpu", "--prompt", "the"]) == 2
    error = capsys.readouterr().err
    assert "dictionary" in error or "shape" in error
    assert error.count("\n") == 1


def old_state(path, mark, reader):
    """Writes what the command wrote before states could save themselves."""
    layers = []
    for layer in reader.state.layers:
        layers.append({name: x for name, x in layer._asdict().items() if x is not None})
    content = {"format": OLD_FORMAT, "model": mark, "pending": reader.pending, "layers": layers}
    torch.save(content, path)


def test_a_state_file_of_before_goes_on(stream, varied, data_bin, tmp_path):
    prompt, options = (
        "the value of the object is not a class",
        ("--greedy", "--tokens", "20", "--stop", "never"),
    )
    model, task, _ = load_model(varied, data_bin)
    reader = Reader(model, task.source_dictionary.eos())
    reader.read(encode(prompt, task.source_dictionary, None))
    old_state(tmp_path / "old.pt", fingerprint(model, task.source_dictionary), reader)
    found = stream("--prompt", "", "--load-state", tmp_path / "old.pt", *options)
    assert found == stream("--prompt", prompt, *options)


def test_a_fingerprint_is_what_it_was_before_models_remembered_their_options():
    folder = tools.REPOSITORY / "tests" / "data"
    model, task, _ = load_model(folder / "flash_lm_v1.pt", folder)
    assert fingerprint(model, task.source_dictionary) == FINGERPRINT


@pytest.mark.parametrize("pending", [-1, 10**9, True, "3", 2.0, None])
def test_a_last_token_that_is_no_word_is_refused(stream, tmp_path, pending):
    path = tmp_path / "state.pt"
    stream("--prompt", "the value", "--save-state", path, "--tokens", "0")
    content = torch.load(path, weights_only=True)
    content["beside"]["pending"] = pending
    torch.save(content, path)
    error = stream("--prompt", "a", "--load-state", path, status=2)
    assert "has the last token" in error
    assert "allowed: 0 to " in error


@pytest.mark.parametrize("change", ["NaN", "layers", "positions", "bytes"])
def test_a_hostile_state_is_refused_in_one_line(stream, tmp_path, change):
    path = tmp_path / "state.pt"
    stream("--prompt", "the value", "--save-state", path, "--tokens", "0")
    content = torch.load(path, weights_only=True)
    layers = content["layers"]
    if change == "NaN":
        layers[0]["v"].fill_(torch.nan)
    elif change == "layers":
        layers.append(layers[0])
    elif change == "positions":
        for layer in layers:
            layer["position"].fill_(10**15)
    torch.save(content, path)
    if change == "bytes":
        whole = bytearray(path.read_bytes())
        whole[whole.index(layers[0]["v"].numpy().tobytes()[:64])] ^= 4
        path.write_bytes(whole)
    error = stream("--prompt", "a", "--load-state", path, status=2)
    assert f"--load-state {path}" in error
    assert error.count("\n") == 1


def test_half_the_bits_give_a_text_and_a_state_of_their_own(stream, tmp_path):
    options = ("--prompt", "the value", "--greedy", "--tokens", "20", "--stop", "never")
    whole = stream(*options, "--bf16", "--save-state", tmp_path / "state.pt")
    assert len(whole.split()) == 20
    on = ("--prompt", "", "--load-state", tmp_path / "state.pt", *options[2:])
    assert stream(*on, "--bf16") == whole
    assert "dtype torch.bfloat16; allowed: torch.float32" in stream(*on, status=2)
    assert {x.dtype for x in torch.load(tmp_path / "state.pt")["layers"][0].values()} >= {torch.bfloat16}


def test_a_step_is_recorded_unless_it_cannot_or_must_not_be(varied, data_bin, monkeypatch):
    model, task, _ = load_model(varied, data_bin)
    calls = []

    objections = []

    class Recorded:
        def __call__(self, stack, token, state):
            calls.append(token.item())
            return stack(token, None, state)

        @staticmethod
        def objections(stack, token, state):
            assert not torch.is_grad_enabled()
            return objections

    monkeypatch.setattr("fairseq_flash.generation.reader.StepGraphs", Recorded)
    texts = []
    for record, objection, expected in ((True, [], 6), (True, ["there is no GPU"], 0), (False, [], 0)):
        calls.clear()
        objections[:] = objection
        reader = Reader(model, task.source_dictionary.eos(), record=record)
        reader.read([5, 6, 7])
        tokens = reader.generate(Choice(task.source_dictionary, greedy=True))
        texts.append([token for _, token in zip(range(6), tokens, strict=False)])
        assert len(calls) == expected
    assert texts[0] == texts[1] == texts[2]


def test_a_temperature_divides_log_probabilities():
    words = Dictionary()
    words.add_symbol("a")
    words.add_symbol("b")
    log_probs = torch.tensor([[-9.0, -9.0, -1.0, -9.0, -0.5, -2.0]]).log_softmax(-1)
    drawn = [Choice(words, temperature=1e-3)(log_probs.clone()) for _ in range(9)]
    assert set(drawn) == {4}
    torch.manual_seed(1)
    assert len({Choice(words, temperature=50.0)(log_probs.clone()) for _ in range(99)}) >= 5


def streamed(symbols, **options):
    words = Dictionary()
    indices = [words.eos() if symbol == "</s>" else words.add_symbol(symbol) for symbol in symbols]
    text = StreamedText(words, True, **options)
    return [text.add(index) for index in indices]


def test_pieces_become_text_and_bytes_become_characters():
    space = "\u2581"
    pieces = [f"{space}The", f"{space}va", "lue", "<0xC3>", "<0xA9>", f"{space}x", "</s>", f"{space}So"]
    expected = ["The", " va", "lue", "", "é", " x", "\n", "So"]
    assert streamed(pieces, at_line_start=True) == expected
    assert streamed(pieces, at_line_start=False) == [" The", *expected[1:]]


def test_bytes_that_make_no_character_are_shown_as_such():
    assert "".join(streamed(["<0xC3>", "a", "<0xE2>", "</s>"], at_line_start=True)) == "\ufffda\ufffd\n"


def test_a_prompt_is_split_as_the_data_was(tmp_path):
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
    tokens = encode("the value\n\nof a", dictionary, tmp_path / "m.model")
    eos, unknown = dictionary.eos(), dictionary.unk()
    assert unknown not in tokens
    assert tokens.count(eos) == 2
    text = StreamedText(dictionary, True, at_line_start=True)
    assert "".join(map(text.add, tokens)) == "the value\n\nof a"
    assert encode("", dictionary, tmp_path / "m.model") == []


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
