"""Proves that flash_seq2seq works in fairseq's translation tools, and that what they print is its own.

Tools run in this process. They print four digits of a score: the tolerance is half of the last one, plus as
much for the way a float32 sum is ordered.
"""

import math
import re

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq
from support import tools

PRINTED = 1e-4
SIZES = (
    *("--embed-dim", "32", "--encoder-layers", "2", "--decoder-layers", "2", "--attention-dim", "16"),
    *("--chunk-size", "8"),
)
RECIPE = (
    *("--task", "translation", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--arch", "flash_seq2seq_tiny", "--batch-size", "8", "--cpu", "--num-workers", "0", "--dropout", "0"),
    *("--optimizer", "adam", "--lr", "0.003", "--clip-norm", "1.0", "--no-epoch-checkpoints"),
    *("--log-format", "json", "--log-interval", "1"),
)
RESUMABLE = {
    "plain": (),
    "separate dictionaries": ("--target-lang", "other"),
    "all embeddings shared": ("--share-all-embeddings",),
    "output embeddings shared": ("--share-decoder-input-output-embed", "--target-lang", "other"),
    "right-padded sources": ("--left-pad-source",),
    "left-padded targets": ("--left-pad-target",),
    "dropout and checkpoint-activations": ("--dropout", "0.1", "--checkpoint-activations"),
    "quadratic": ("--attention", "quadratic"),
}
BAD_OPTIONS = {
    "no encoder": (("--encoder-layers", "0"), "encoder-layers 0 is not allowed; allowed: 1 or more"),
    "no decoder": (("--decoder-layers", "-1"), "decoder-layers -1 is not allowed; allowed: 1 or more"),
    "odd embed dim": (("--embed-dim", "31"), "embed-dim 31 .*allowed: even numbers from 2"),
    "odd attention dim": (("--attention-dim", "15"), "attention.dim.15 .*even"),
    "no expansion": (("--expansion-factor", "0"), "expansion.factor.0 .*allowed: 1 or more"),
    "chunk size 0": (("--chunk-size", "0"), "chunk.size.0 .*allowed: 1 or more"),
    "dropout of 1": (("--dropout", "1"), "dropout.1.*allowed: 0 to below 1"),
    "kernel that cannot run": (("--backend", "triton"), "backend.*triton.* cannot run.*allowed"),
    "n_ref without effect": (("--n-ref", "64"), "n-ref 64 has no effect.*allowed: .*quadratic"),
    "shared embeddings of two dictionaries": (
        ("--share-all-embeddings", "--target-lang", "other"),
        "share-all-embeddings needs one dictionary; the source's has .* they differ; allowed: ",
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Parallel text: Python's documentation as pieces, the same backwards, and that in other letters."""
    folder = tmp_path_factory.mktemp("parallel")
    lines = [[f"▁{word}" for word in line.split()] for line in tools.real_lines()]
    splits = {"train": lines[:300], "valid": lines[300:320], "test": [*lines[320:330], [], ["▁the"] * 70]}
    for name, split in splits.items():
        sides = {
            "here": [" ".join(words) for words in split],
            "there": [" ".join(reversed(words)) for words in split],
            "other": [" ".join(reversed(words)).upper() for words in split],
        }
        for language, side in sides.items():
            (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in side))
    return folder


@pytest.fixture(scope="module")
def data_bin(texts):
    """Two pairs of languages: here-there with a joined dictionary, here-other with separate ones."""
    words = [word for name in ("train", "valid", "test") for word in (f"--{name}pref", texts / name)]
    limits = ("--destdir", texts / "bin", "--workers", "1")
    joined = ("--target-lang", "there", "--joined-dictionary", "--nwordssrc", "200")
    tools.call("preprocess", "--source-lang", "here", *joined, *words, *limits)
    separate = ("--target-lang", "other", "--srcdict", texts / "bin" / "dict.here.txt", "--nwordstgt", "150")
    separate = (*separate, "--destdir", texts / "apart", "--workers", "1")
    tools.call("preprocess", "--source-lang", "here", *separate, *words)
    for path in (texts / "apart").glob("*other*"):
        path.rename(texts / "bin" / path.name)
    return texts / "bin"


def train(data_bin, save_dir, *arguments, updates: int = 3) -> str:
    """Trains in this process for ``updates`` in all; resumes if ``save_dir`` has a checkpoint."""
    languages = [] if "--target-lang" in arguments else ["--target-lang", "there"]
    base = (data_bin, "--user-dir", tools.USER_DIR, "--source-lang", "here", *languages, *RECIPE, *SIZES)
    return tools.call("train", *base, "--save-dir", save_dir, "--max-update", updates, *arguments)


@pytest.fixture(scope="module")
def training(data_bin, tmp_path_factory):
    """What a longer training printed, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    bleu = ("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 20}')
    bleu = (*bleu, "--eval-bleu-remove-bpe", "sentencepiece")
    output = train(data_bin, folder, "--share-all-embeddings", *bleu, updates=70)
    return output, folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def checkpoint(training):
    return training[1]


@pytest.fixture(scope="module")
def second_checkpoint(data_bin, tmp_path_factory):
    """Of another seed and other embeddings."""
    folder = tmp_path_factory.mktemp("trained_again")
    train(data_bin, folder, "--seed", "2", updates=20)
    return folder / "checkpoint_last.pt"


def evaluation(path) -> tuple:
    """The arguments that every tool needs to use a checkpoint."""
    return ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--num-workers", "0")


def generate(data_bin, path, *arguments, target: str = "there") -> str:
    languages = ("--source-lang", "here", "--target-lang", target)
    return tools.call("generate", data_bin, *evaluation(path), *languages, "--gen-subset", "test", *arguments)


def load(path, data_bin):
    """The model and task of a checkpoint."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(data_bin)}
    )
    return models[0].eval(), task


def forced(models, task, source: str, words: list[str]) -> torch.Tensor:
    """Base-2 log probabilities of every next token, given source and words before: one parallel pass."""
    dictionary = task.source_dictionary
    sources = torch.tensor([[*map(dictionary.index, source.split()), dictionary.eos()]])
    tokens = torch.tensor([[task.target_dictionary.eos(), *map(task.target_dictionary.index, words)]])
    with torch.no_grad():
        each = [
            model.get_normalized_probs(model(sources, None, tokens), log_probs=True)[0] for model in models
        ]
    return (torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))) / math.log(2)


def assert_scores_are_the_models(models, task, output: str) -> int:
    """Compares the P rows of a tool with teacher forcing of its H rows; gives the number of hypotheses."""
    compared, scores, sources = 0, tools.rows(output, "P"), tools.rows(output, "S")
    for number, hypotheses in tools.rows(output, "H").items():
        for (_, text), (printed,) in zip(hypotheses, scores[number], strict=True):
            words = text.split()
            log_probs = forced(models, task, sources[number][0][0], words)
            targets = [*map(task.target_dictionary.index, words), task.target_dictionary.eos()]
            expected = log_probs[torch.arange(len(targets)), targets]
            found = torch.tensor([float(score) for score in printed.split()])
            torch.testing.assert_close(found, expected, atol=PRINTED, rtol=0)
            compared += 1
    return compared


def test_training_lowers_the_loss_and_measures_bleu(training):
    output, path = training
    losses = [float(loss) for _, loss in tools.losses(output)]
    assert len(losses) == 70
    assert sum(losses[-10:]) < sum(losses[:10]) - 10
    assert re.search(r'"valid_bleu": "[\d.]+"', output)
    assert path.exists()


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("side", [(), ("--left-pad-source",)], ids=["left", "right"])
def test_a_beam_gives_scores_of_the_parallel_pass_in_any_batch_padded_on_any_side(
    checkpoint, data_bin, batch, side
):
    """``--left-pad-source`` turns off what is on, as fairseq makes a flag of every option."""
    arguments = ("--beam", 4, "--nbest", 4, "--max-len-b", 20, "--batch-size", batch)
    output = generate(data_bin, checkpoint, *arguments, *side)
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task, output) == 4 * 12
    for hypotheses in tools.rows(output, "H").values():
        scores = [float(score) for score, _ in hypotheses]
        assert scores == sorted(scores, reverse=True)


def test_greedy_search_takes_the_likeliest_word_of_the_parallel_pass(checkpoint, data_bin):
    output = generate(data_bin, checkpoint, "--beam", 1, "--max-len-b", 20, "--batch-size", 5)
    model, task = load(checkpoint, data_bin)
    for number, ((_, text),) in tools.rows(output, "H").items():
        words = text.split()
        log_probs = forced([model], task, tools.rows(output, "S")[number][0][0], words)[:20]
        log_probs[:, task.target_dictionary.pad()] = -math.inf
        targets = [*map(task.target_dictionary.index, words), task.target_dictionary.eos()][:20]
        found = log_probs[torch.arange(len(targets)), targets]
        torch.testing.assert_close(found, log_probs.max(dim=1).values, atol=PRINTED, rtol=0)


def test_an_ensemble_gives_the_mean_of_its_models(checkpoint, second_checkpoint, data_bin):
    paths = f"{checkpoint}:{second_checkpoint}"
    output = generate(data_bin, paths, "--beam", 3, "--max-len-b", 20, "--batch-size", 5)
    models, loaded = zip(*(load(path, data_bin) for path in (checkpoint, second_checkpoint)), strict=True)
    assert assert_scores_are_the_models(models, loaded[0], output) == 12


def test_sampling_follows_its_seed(checkpoint, data_bin):
    arguments = ("--sampling", "--sampling-topk", 5, "--beam", 2, "--nbest", 2, "--max-len-b", 20)
    first, again, other = (
        generate(data_bin, checkpoint, *arguments, "--batch-size", 5, "--seed", seed) for seed in (1, 1, 2)
    )
    assert tools.rows(first, "H") == tools.rows(again, "H") != tools.rows(other, "H")
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task, first) == 24


def test_pieces_become_words_again_and_are_scored_by_sacrebleu(checkpoint, data_bin):
    output = generate(data_bin, checkpoint, "--remove-bpe", "sentencepiece", "--scoring", "sacrebleu")
    assert "▁" not in "".join(text for ((_, text),) in tools.rows(output, "H").values())
    assert re.search(r"Generate test with beam=5: BLEU.* = \d", output)


def test_a_forced_beginning_is_kept(checkpoint, data_bin):
    arguments = ("--prefix-size", 2, "--beam", 3, "--max-len-b", 20, "--gen-subset", "valid")
    output = generate(data_bin, checkpoint, *arguments)
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task, output) == 20
    for number, ((_, text),) in tools.rows(output, "H").items():
        reference = tools.rows(output, "T")[number][0][0].replace("<<unk>>", "<unk>").split()
        assert text.split()[:2] == reference[:2]


def test_interactive_translates_whatever_is_typed(checkpoint, data_bin, tmp_path):
    """An empty line, words that nobody knows, and a source longer than any in training."""
    lines = ["▁the ▁value", "", "nobody knows these", "▁the " * 900, "▁of", "▁if ▁the ▁class"]
    (tmp_path / "input").write_text("".join(f"{line}\n" for line in lines))
    arguments = ("interactive", data_bin, *evaluation(checkpoint), "--source-lang", "here", "--beam", 3)
    arguments = (*arguments, "--target-lang", "there", "--max-len-b", 16, "--input", tmp_path / "input")
    together = tools.call(*arguments, "--buffer-size", 6, "--batch-size", 6)
    alone = tools.call(*arguments)
    found, expected = (tools.rows(output, "H") for output in (together, alone))
    assert sorted(found) == sorted(expected) == ["0", "1", "2", "3", "4", "5"]
    for number in found:
        ((score, text),), ((other_score, other_text),) = found[number], expected[number]
        assert text == other_text
        assert float(score) == pytest.approx(float(other_score), abs=1e-5)


def test_a_source_has_no_maximum_but_the_tasks_own(checkpoint, data_bin, tmp_path):
    (tmp_path / "input").write_text("▁the " * 3000 + "\n")
    arguments = ("interactive", data_bin, *evaluation(checkpoint), "--source-lang", "here", "--beam", 1)
    arguments = (*arguments, "--target-lang", "there", "--max-len-b", 9, "--input", tmp_path / "input")
    output = tools.call(*arguments, "--max-source-positions", 4000, "--max-tokens", 4000)
    ((score, _),) = tools.rows(output, "H")["0"]
    assert math.isfinite(float(score))


def test_the_hub_interface_translates_and_scores(checkpoint, data_bin):
    hub = FlashSeq2Seq.from_pretrained(str(checkpoint.parent), checkpoint.name, str(data_bin))
    sources = ["▁the ▁value ▁of", "▁if ▁the", ""]
    translated = hub.translate(sources, beam=3, max_len_b=12)
    assert [hub.translate(source, beam=3, max_len_b=12) for source in sources] == translated
    (found,) = hub.generate([hub.encode("▁the ▁value")], beam=2, max_len_b=12, nbest=2)
    words = hub.tgt_dict.string(found[0]["tokens"]).split()
    expected = forced(hub.models, hub.task, "▁the ▁value", words) * math.log(2)
    scores = found[0]["positional_scores"]
    targets = found[0]["tokens"]
    torch.testing.assert_close(scores, expected[torch.arange(len(targets)), targets], atol=PRINTED, rtol=0)


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_training_is_the_same_to_the_bit_and_generates(data_bin, tmp_path, name):
    arguments = RESUMABLE[name]
    straight = train(data_bin, tmp_path / "straight", *arguments, updates=4)
    first = train(data_bin, tmp_path / "parts", *arguments, updates=2)
    rest = train(data_bin, tmp_path / "parts", *arguments, updates=4)
    assert tools.losses(first) + tools.losses(rest) == tools.losses(straight)
    one, other = (torch.load(tmp_path / run / "checkpoint_last.pt")["model"] for run in ("straight", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    target = "other" if "other" in arguments else "there"
    path = tmp_path / "parts" / "checkpoint_last.pt"
    output = generate(data_bin, path, "--beam", 3, "--max-len-b", 12, "--batch-size", 5, target=target)
    model, task = load(path, data_bin)
    assert assert_scores_are_the_models([model], task, output) == 12


def test_it_trains_in_bfloat16(data_bin, tmp_path):
    plain, narrow = (train(data_bin, tmp_path / str(len(words)), *words) for words in ((), ("--bf16",)))
    for (_, expected), (_, found) in zip(tools.losses(plain), tools.losses(narrow), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=0.02)


def test_saving_memory_does_not_change_the_training(data_bin, tmp_path):
    plain, saving = (
        tools.losses(train(data_bin, tmp_path / str(len(words)), "--dropout", "0.1", *words))
        for words in ((), ("--checkpoint-activations",))
    )
    assert plain == saving


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_that_is_not_allowed_is_named(data_bin, tmp_path, name):
    arguments, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        train(data_bin, tmp_path, *arguments)


@pytest.mark.parametrize(("side", "language"), [("source", "here"), ("target", "there")])
def test_another_dictionary_at_fine_tuning_or_generation_is_refused(
    second_checkpoint, data_bin, tmp_path, side, language
):
    for path in data_bin.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dictionary = tmp_path / f"dict.{language}.txt"
    dictionary.write_text(dictionary.read_text() + "new 1\nwords 1\n")
    message = rf"the dictionary of the {side} has \d+ words; allowed: \d+, those that the checkpoint"
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, second_checkpoint)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tmp_path / "saved", "--finetune-from-model", second_checkpoint)


def test_a_checkpoint_of_other_sizes_is_refused(second_checkpoint, data_bin, tmp_path):
    fine_tuning = ("--finetune-from-model", second_checkpoint, "--decoder-layers", "1")
    with pytest.raises(ValueError, match=r"--decoder-layers 1 \(trained with"):
        train(data_bin, tmp_path, *fine_tuning)


def test_alignments_are_refused_before_work_begins(second_checkpoint, data_bin, tmp_path):
    with pytest.raises(ValueError, match="--print-alignment is not allowed"):
        generate(data_bin, second_checkpoint, "--print-alignment", "hard")
    with pytest.raises(ValueError, match=r"--load-alignments .* is not allowed"):
        train(data_bin, tmp_path, "--load-alignments")
    criterion = "label_smoothed_cross_entropy_with_alignment"
    with pytest.raises(ValueError, match=f"--criterion {criterion} is not allowed"):
        train(data_bin, tmp_path, "--criterion", criterion)
