"""Proves that flash_lm works in every tool of fairseq, and that what the tools print is the model's own.

Tools run in this process, except where a new process is the point. They print four digits of a score: the
tolerance is half of the last one, plus as much for the way a float32 sum is ordered.
"""

import math
import re
import shutil

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_flash.models.flash_lm import FlashLanguageModel
from support import tools

PRINTED = 1e-4
SENTENCES = ("--task", "language_modeling", "--gen-subset", "test", "--sample-break-mode", "eos")
RESUMABLE = {
    "plain": (),
    "dropout": ("--dropout", "0.1"),
    "adafactor": ("--optimizer", "adafactor"),
    "sgd": ("--optimizer", "sgd"),
    "ema": ("--store-ema", "--ema-decay", "0.9"),
    "update-freq": ("--update-freq", "2"),
    "checkpoint-activations": ("--checkpoint-activations",),
    "offload-activations": ("--offload-activations",),
    "adaptive": (
        *("--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp", "--tie-adaptive-weights"),
        *("--adaptive-input", "--adaptive-input-cutoff", "50,100", "--adaptive-softmax-cutoff", "50,100"),
    ),
    "tied": ("--share-decoder-input-output-embed",),
    "quadratic": ("--attention", "quadratic"),
    "quadratic toeplitz": ("--attention", "quadratic", "--relative-bias", "toeplitz"),
    "local": ("--attention", "local"),
    "global": ("--attention", "global", "--linear-norm", "mean"),
    "eos": ("--sample-break-mode", "eos", "--add-bos-token"),
    "warmup": ("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4"),
}
BAD_OPTIONS = {
    "chunk size 0": (("--chunk-size", "0"), "chunk.size.0 .*allowed: 1 or more"),
    "negative chunk size": (("--chunk-size", "-8"), "chunk.size.-8 .*allowed: 1 or more"),
    "odd attention dim": (("--attention-dim", "15"), "attention.dim.15 .*even"),
    "negative attention dim": (("--attention-dim", "-2"), "attention.dim.-2 .*allowed: 1 or more"),
    "negative embed dim": (("--embed-dim", "-32"), "embed.dim.-32 .*allowed: even numbers from 2"),
    "odd embed dim": (("--embed-dim", "31"), "embed.dim.31 .*allowed: even numbers from 2"),
    "no layers": (("--layers", "0"), "layers.0 .*allowed: 1 or more"),
    "negative layers": (("--layers", "-1"), "layers.-1 .*allowed: 1 or more"),
    "negative expansion": (("--expansion-factor", "-2"), "expansion.factor.-2 .*allowed: 1 or more"),
    "dropout of 1": (("--dropout", "1"), "dropout.1.*allowed: 0 to below 1"),
    "negative n_ref": (("--attention", "quadratic", "--n-ref", "-1"), "n.ref.-1 .*allowed: 1 or more"),
    "attention dropout": (("--attention-dropout", "0.1"), "attention-dropout 0.1 .*allowed: 0"),
    "attention dropout without effect": (
        ("--block", "transformer", "--attention", "global", "--attention-dropout", "0.1"),
        "attention-dropout 0.1 has no effect.*allowed: 0",
    ),
    "width of a network without effect": (
        ("--ffn-embed-dim", "64"),
        "ffn-embed-dim 64 have no effect.*allowed",
    ),
    "gate without effect": (("--glu",), "--glu and .* have no effect.*allowed"),
    "expansion without effect": (
        ("--block", "transformer", "--expansion-factor", "3"),
        "expansion-factor 3 has no effect.*allowed: --ffn-embed-dim",
    ),
    "bias of a transformer": (
        ("--block", "transformer", "--relative-bias", "rotary"),
        "relative-bias rotary has no effect.*allowed: --block gau",
    ),
    "heads that do not fit": (
        ("--block", "transformer", "--attention-dim", "12"),
        "attention.dim.12, the size of a head, .*allowed: even divisors of embed_dim=32",
    ),
    "kernel that cannot run": (("--backend", "triton"), "backend.*triton.* cannot run.*allowed"),
    "n_ref without effect": (
        ("--n-ref", "64"),
        "n-ref 64 has no effect.*allowed: --block gau --attention quadratic",
    ),
    "bias without effect": (
        ("--attention", "global", "--relative-bias", "rotary"),
        "relative-bias rotary has no effect.*allowed",
    ),
    "shared and adaptive softmax": (
        ("--share-decoder-input-output-embed", "--adaptive-softmax-cutoff", "50,100"),
        "share-decoder-input-output-embed .*allowed: --tie-adaptive-weights",
    ),
    "cutoffs without adaptive input": (("--adaptive-input-cutoff", "50"), "needs --adaptive-input"),
    "tied projections alone": (("--tie-adaptive-proj",), "tie-adaptive-weights .* needs --adaptive-input"),
    "adaptive factor 0": (
        ("--adaptive-input", "--adaptive-input-cutoff", "50", "--adaptive-input-factor", "0"),
        "adaptive-input-factor 0.* allowed: 1 or more",
    ),
    "adaptive dropout": (
        ("--adaptive-softmax-cutoff", "50", "--adaptive-softmax-dropout", "1.5"),
        "adaptive-softmax-dropout 1.5.* allowed: 0 to below 1",
    ),
    "tied and adaptive": (
        ("--adaptive-input", "--adaptive-input-cutoff", "50", "--share-decoder-input-output-embed"),
        "share-decoder-input-output-embed .*allowed: --tie-adaptive-weights",
    ),
    "cutoffs beyond the dictionary": (
        ("--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "50,9999"),
        "adaptive-softmax-cutoff '50,9999' .*allowed: ascending integers",
    ),
}
OPTIONS = {**RESUMABLE, "bf16": ("--bf16",)}
UNKNOWN_CHOICES = ("--attention", "--linear-norm", "--norm", "--relative-bias", "--backend")


def evaluation(path) -> tuple:
    """The arguments that every tool needs to use a checkpoint."""
    return ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--num-workers", "0")


def load(path, data_bin):
    """The model and task of a checkpoint."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(data_bin)}
    )
    return models[0].eval(), task


def forced(models, dictionary, words: list[str]) -> torch.Tensor:
    """Base-2 log probabilities of every next token, given the words before it: one parallel pass.

    (n + 1, vocabulary) for n words; the mean of the probabilities where there are several models.
    """
    tokens = torch.tensor([[dictionary.eos(), *(dictionary.index(word) for word in words)]])
    with torch.no_grad():
        each = [model.get_normalized_probs(model(tokens), log_probs=True)[0] for model in models]
    return (torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))) / math.log(2)


def assert_scores_are_the_models(models, dictionary, output: str) -> int:
    """Compares the P rows of a tool with teacher forcing of its H rows; gives the number of hypotheses."""
    compared, scores = 0, tools.rows(output, "P")
    for number, hypotheses in tools.rows(output, "H").items():
        for (_, text), (printed,) in zip(hypotheses, scores[number], strict=True):
            words = text.split()
            log_probs = forced(models, dictionary, words)
            targets = [*(dictionary.index(word) for word in words), dictionary.eos()]
            expected = log_probs[torch.arange(len(targets)), targets]
            found = torch.tensor([float(score) for score in printed.split()])
            torch.testing.assert_close(found, expected, atol=PRINTED, rtol=0)
            compared += 1
    return compared


def generate(data_bin, path, *arguments) -> str:
    return tools.call("generate", data_bin, *evaluation(path), *SENTENCES, *arguments)


def first_words(data_bin) -> dict[str, list[str]]:
    """The sentences of the test split by number."""
    lines = (data_bin.parent / "test").read_text().splitlines()
    return {str(number): line.split() for number, line in enumerate(lines)}


@pytest.fixture(scope="module")
def from_the_repository(tmp_path_factory):
    """Preprocessing, training and evaluation as a user types them in the repository's root."""
    folder = tmp_path_factory.mktemp("user")
    tools.write_texts(folder)
    data, saved = folder / "bin", folder / "saved"
    arguments = tools.preprocess_arguments(folder, ["train", "valid", "test"])
    plug_in = ("--user-dir", "fairseq_flash")
    model = (*tools.TINY, *tools.CHUNKS, *tools.RECIPE, *tools.ADAM)
    outputs = {
        "preprocess": tools.run("fairseq-preprocess", *arguments),
        "train": tools.run("fairseq-train", data, *plug_in, *model, "--save-dir", saved, "--max-update", 3),
    }
    path = ("--path", saved / "checkpoint_last.pt", "--cpu")
    outputs["eval-lm"] = tools.run(
        "fairseq-eval-lm", data, *plug_in, *path, "--tokens-per-sample", 32, "--batch-size", 4
    )
    outputs["interactive"] = tools.run(
        *("fairseq-interactive", data, *plug_in, *path, "--task", "language_modeling", "--max-len-b", 9),
        stdin="the value\n\nif the\n",
    )
    return outputs


@pytest.mark.parametrize("tool", ["preprocess", "train", "eval-lm", "interactive"])
def test_a_tool_works_with_the_bare_name_in_the_repository(from_the_repository, tool):
    done = from_the_repository[tool]
    assert done.returncode == 0, done.stdout


def test_what_the_processes_print_is_what_they_did(from_the_repository):
    assert [update for update, _ in tools.losses(from_the_repository["train"].stdout)] == ["1", "2", "3"]
    assert 50 < tools.perplexity(from_the_repository["eval-lm"].stdout) < 250
    hypotheses = tools.rows(from_the_repository["interactive"].stdout, "H")
    assert [len(hypotheses[number]) for number in ("0", "1", "2")] == [1, 1, 1]
    assert hypotheses["0"][0][1].startswith("the value")


def train_in_python(data_bin, saved, *arguments, before="", cwd, **environment):
    """fairseq-train in a new Python, which then says where the package was found."""
    code = f"import sys\n{before}\nfrom fairseq_cli.train import cli_main\ncli_main()\n"
    code += "print('USED', sys.modules['fairseq_flash'].__file__)"
    recipe = (*tools.RECIPE, *tools.ADAM, "--save-dir", saved, "--max-update", 1)
    words = (data_bin, *tools.TINY, *tools.CHUNKS, *recipe, *arguments)
    done = tools.run("python", "-c", code, *words, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout
    assert len(tools.losses(done.stdout)) == 1
    return re.search(r"^USED (.*)$", done.stdout, flags=re.MULTILINE)[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds a copy of the package and nothing else, as ``pip install --target`` makes it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(tools.USER_DIR, site / "fairseq_flash", ignore=shutil.ignore_patterns("__pycache__"))
    return site


def test_a_copy_elsewhere_is_found_by_its_path(data_bin, tmp_path, installed):
    path = installed / "fairseq_flash"
    used = train_in_python(data_bin, tmp_path / "saved", "--user-dir", path, cwd=tmp_path)
    assert used == str(path / "__init__.py")


@pytest.mark.long
def test_a_copy_elsewhere_is_found_by_its_bare_name_beside_it(data_bin, tmp_path, installed):
    used = train_in_python(data_bin, tmp_path / "saved", "--user-dir", "fairseq_flash", cwd=installed)
    assert used == str(installed / "fairseq_flash" / "__init__.py")


def test_the_models_are_registered_where_the_package_was_imported_first(data_bin, tmp_path, installed):
    used = train_in_python(
        *(data_bin, tmp_path / "saved", "--user-dir", installed / "fairseq_flash"),
        before="import fairseq_flash",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert used == str(installed / "fairseq_flash" / "__init__.py")


@pytest.mark.long
def test_no_user_dir_is_needed_where_the_package_was_imported_first(data_bin, tmp_path):
    train_in_python(data_bin, tmp_path / "saved", before="import fairseq_flash", cwd=tmp_path)


def test_a_failing_tool_exits_with_an_error(data_bin, tmp_path):
    arguments = (*tools.TINY, *tools.RECIPE, *tools.ADAM, "--save-dir", tmp_path, "--chunk-size", "0")
    done = tools.run("fairseq-train", data_bin, "--user-dir", tools.USER_DIR, *arguments)
    assert done.returncode != 0
    assert "chunk_size=0 is not allowed; allowed: 1 or more" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("window", [0, 8])
def test_eval_lm_prints_the_loss_of_the_parallel_pass(checkpoint, data_bin, window):
    length = 32
    arguments = ("--gen-subset", "test", "--tokens-per-sample", length, "--batch-size", 4)
    output = tools.call("eval-lm", data_bin, *evaluation(checkpoint), *arguments, "--context-window", window)
    model, task = load(checkpoint, data_bin)
    dictionary = task.source_dictionary
    sentences = [[*words, "</s>"] for words in first_words(data_bin).values()]
    words = [word for sentence in sentences for word in sentence]
    # Blocks of new tokens, each after as many old ones as the window allows; the first begins the text.
    new, total = length - window, 0.0
    for start in range(0, len(words), length if not window else new):
        context = words[max(0, start - window) : start]
        block = words[start : start + (length if not window else new)]
        tokens = torch.tensor([[dictionary.index(word) for word in context + block]])
        previous = words[start - len(context) - 1] if start > len(context) else "</s>"
        inputs = torch.cat((torch.tensor([[dictionary.index(previous)]]), tokens[:, :-1]), dim=1)
        with torch.no_grad():
            scores = model.get_normalized_probs(model(inputs), log_probs=True)[0]
        total -= scores[torch.arange(len(tokens[0])), tokens[0]][len(context) :].sum().item()
    assert f"Evaluated {len(words)} tokens" in output
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", output)[1])
    assert loss == pytest.approx(total / len(words) / math.log(2), abs=PRINTED)


def test_validate_prints_the_loss_that_training_found(data_bin, tmp_path):
    trained = tools.train(data_bin, tmp_path)
    expected = re.search(r'"valid_loss": "([\d.]+)"', trained)[1]
    output = tools.call(
        *("validate", data_bin, *evaluation(tmp_path / "checkpoint_last.pt"), "--task", "language_modeling"),
        *("--valid-subset", "valid", "--tokens-per-sample", 32, "--batch-size", 4),
    )
    assert f"valid on 'valid' subset | loss {expected} " in output


def test_score_reference_scores_every_sentence_as_the_model_does(checkpoint, data_bin):
    output = generate(data_bin, checkpoint, "--score-reference", "--batch-size", 5)
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task.source_dictionary, output) == 12


def test_greedy_generation_takes_the_likeliest_word_of_the_parallel_pass(checkpoint, data_bin):
    output = generate(
        data_bin, checkpoint, "--beam", 1, "--prefix-size", 3, "--max-len-b", 20, "--batch-size", 5
    )
    model, task = load(checkpoint, data_bin)
    dictionary = task.source_dictionary
    assert assert_scores_are_the_models([model], dictionary, output) == 12
    for number, ((_, text),) in tools.rows(output, "H").items():
        words = text.split()
        assert words[:3] == [dictionary[dictionary.index(w)] for w in first_words(data_bin)[number][:3]]
        log_probs = forced([model], dictionary, words)[3:20]
        log_probs[:, dictionary.pad()] = -math.inf
        best = log_probs.max(dim=1).values
        targets = [*(dictionary.index(word) for word in words), dictionary.eos()][3:20]
        found = log_probs[torch.arange(len(targets)), targets]
        torch.testing.assert_close(found, best, atol=PRINTED, rtol=0)


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_a_beam_gives_scores_of_the_parallel_pass_in_any_batch(checkpoint, data_bin, batch):
    arguments = ("--beam", 4, "--nbest", 4, "--prefix-size", 2, "--max-len-b", 20)
    output = generate(data_bin, checkpoint, *arguments, "--batch-size", batch)
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task.source_dictionary, output) == 48
    for hypotheses in tools.rows(output, "H").values():
        scores = [float(score) for score, _ in hypotheses]
        assert scores == sorted(scores, reverse=True)


def test_an_ensemble_gives_the_mean_of_its_models(checkpoint, second_checkpoint, data_bin):
    arguments = ("--beam", 3, "--prefix-size", 2, "--max-len-b", 20, "--batch-size", 5)
    output = generate(data_bin, f"{checkpoint}:{second_checkpoint}", *arguments)
    models, tasks = zip(*(load(path, data_bin) for path in (checkpoint, second_checkpoint)), strict=True)
    assert assert_scores_are_the_models(models, tasks[0].source_dictionary, output) == 12


@pytest.mark.parametrize("options", [(), ("--sampling-topk", 3), ("--sampling-topp", "0.2")])
def test_sampling_follows_its_seed_and_its_limits(checkpoint, data_bin, options):
    arguments = ("--sampling", *options, "--beam", 2, "--nbest", 2, "--prefix-size", 2, "--max-len-b", 20)
    first, again, other = (
        generate(data_bin, checkpoint, *arguments, "--batch-size", 5, "--seed", seed) for seed in (1, 1, 2)
    )
    assert tools.rows(first, "H") == tools.rows(again, "H") != tools.rows(other, "H")
    model, task = load(checkpoint, data_bin)
    dictionary = task.source_dictionary
    for hypotheses in tools.rows(first, "H").values():
        for _, text in hypotheses:
            words = text.split()
            log_probs = forced([model], dictionary, words)
            log_probs[:, dictionary.pad()] = -math.inf
            for step in range(2, min(len(words), 20)):
                word = dictionary.index(words[step])
                better = log_probs[step] > log_probs[step, word] + PRINTED
                if "--sampling-topk" in options:
                    assert better.sum() < 3
                if "--sampling-topp" in options:
                    assert log_probs[step].exp2()[better].sum() < 0.2 + PRINTED


def test_interactive_continues_prompts_of_all_lengths_as_one_by_one(checkpoint, data_bin, tmp_path):
    prompts = [
        "the",
        "",
        "if the class is a",
        "the value of",
        "",
        "an object , and then the name of it is not a",
    ]
    (tmp_path / "prompts").write_text("".join(line + "\n" for line in prompts))
    arguments = (
        *("interactive", data_bin, *evaluation(checkpoint), "--task", "language_modeling", "--beam", 3),
        *("--max-len-b", 16, "--input", tmp_path / "prompts"),
    )
    together = tools.call(*arguments, "--buffer-size", 6, "--batch-size", 6)
    alone = tools.call(*arguments)
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task.source_dictionary, together) == 6
    for number, line in enumerate(prompts):
        (_, text), (_, other) = (tools.rows(out, "H")[str(number)][0] for out in (together, alone))
        assert text == other
        assert text.startswith(line)
        assert 1 + len(line.split()) <= len(text.split()) <= 16


def test_a_blank_line_in_the_data_is_a_prompt_too(checkpoint, data_bin, tmp_path):
    lines = tools.real_lines()
    tools.write_texts(tmp_path, test=[lines[0], "", lines[1], "", lines[2]])
    texts = tools.preprocess_arguments(tmp_path, ["test"])
    tools.call("preprocess", *texts[: texts.index("--nwordssrc")], "--srcdict", data_bin / "dict.txt")
    (tmp_path / "bin" / "dict.txt").write_text((data_bin / "dict.txt").read_text())
    output = generate(tmp_path / "bin", checkpoint, "--prefix-size", 3, "--beam", 3, "--max-len-b", 10)
    model, task = load(checkpoint, data_bin)
    assert assert_scores_are_the_models([model], task.source_dictionary, output) == 5


def test_no_sentence_is_lost_whatever_the_size_of_the_last_batch(checkpoint, data_bin):
    output = tools.call(
        *("generate", data_bin, *evaluation(checkpoint), *SENTENCES, "--batch-size", 5, "--beam", 1),
        *("--prefix-size", 3, "--max-len-b", 9),
    )
    assert sorted(tools.rows(output, "H"), key=int) == [str(number) for number in range(12)]


def test_the_hub_interface_samples_and_scores(checkpoint, data_bin):
    hub = FlashLanguageModel.from_pretrained(
        str(checkpoint.parent), checkpoint.name, str(data_bin), user_dir=str(tools.USER_DIR)
    )
    prompts = ["the value of", "if the"]
    sampled = hub.sample(prompts, beam=2, max_len_b=12)
    assert [text.startswith(prompt) for text, prompt in zip(sampled, prompts, strict=True)] == [True, True]
    assert sampled == [hub.sample(prompt, beam=2, max_len_b=12) for prompt in prompts]
    scored = hub.score("the value of")
    dictionary = hub.task.source_dictionary
    words = ["the", "value", "of"]
    expected = forced(hub.models, dictionary, words) * math.log(2)
    targets = [*(dictionary.index(word) for word in words), dictionary.eos()]
    found = scored["positional_scores"]
    torch.testing.assert_close(found, expected[torch.arange(4), targets][: len(found)], atol=PRINTED, rtol=0)


@pytest.mark.parametrize("attention", ["mixed_chunk", "quadratic"])
def test_the_mean_of_two_checkpoints_is_a_checkpoint(data_bin, tmp_path, attention):
    states = []
    for seed in ("1", "2"):
        tools.train(data_bin, tmp_path / seed, "--attention", attention, "--seed", seed)
        states.append(torch.load(tmp_path / seed / "checkpoint_last.pt"))
    mean = {}
    for name, tensor in states[0]["model"].items():
        total = tensor + states[1]["model"][name]
        mean[name] = total / 2 if total.is_floating_point() else total // 2
    torch.save({**states[0], "model": mean}, tmp_path / "mean.pt")
    model, _ = load(tmp_path / "mean.pt", data_bin)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, mean[name]), name


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_training_is_the_same_to_the_bit(data_bin, tmp_path, name):
    arguments = RESUMABLE[name]
    straight = tools.train(data_bin, tmp_path / "straight", *arguments, updates=6)
    first = tools.train(data_bin, tmp_path / "parts", *arguments, updates=3)
    rest = tools.train(data_bin, tmp_path / "parts", *arguments, updates=6)
    assert "Loaded checkpoint" in rest
    assert tools.losses(first) + tools.losses(rest) == tools.losses(straight)
    assert len(tools.losses(straight)) == 6
    one, other = (torch.load(tmp_path / run / "checkpoint_last.pt") for run in ("straight", "parts"))
    for state in (one, other):
        # fairseq's adaptive input and softmax keep a number in the checkpoint that nobody ever set.
        state["model"] = {name: x for name, x in state["model"].items() if not name.endswith("_float_tensor")}
    assert_same(one["model"], other["model"])
    assert_same(one["last_optimizer_state"], other["last_optimizer_state"])
    assert one["extra_state"]["val_loss"] == other["extra_state"]["val_loss"]
    if name == "ema":
        assert_same(one["extra_state"]["ema"], other["extra_state"]["ema"])
        assert not torch.equal(
            one["extra_state"]["ema"]["decoder.output_projection.weight"],
            one["model"]["decoder.output_projection.weight"],
        )


def test_a_resumed_training_in_bfloat16_goes_on_where_it_was(data_bin, tmp_path):
    """fairseq writes the weights in bfloat16 and rounds the exact ones away: equal to their precision."""
    straight = tools.train(data_bin, tmp_path / "straight", "--bf16", updates=6)
    first = tools.train(data_bin, tmp_path / "parts", "--bf16", updates=3)
    rest = tools.train(data_bin, tmp_path / "parts", "--bf16", updates=6)
    found = [float(loss) for _, loss in tools.losses(first) + tools.losses(rest)]
    expected = [float(loss) for _, loss in tools.losses(straight)]
    assert found == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)
    assert found[3] < found[0] - 0.05


def assert_same(one, other):
    """Nested containers of tensors and numbers, equal to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        for value, counterpart in zip(one, other, strict=True):
            assert_same(value, counterpart)
    else:
        assert one == other


@pytest.mark.parametrize("name", ["checkpoint-activations", "offload-activations"])
def test_saving_memory_does_not_change_the_training(data_bin, tmp_path, name):
    plain = tools.train(data_bin, tmp_path / "plain", "--dropout", "0.1")
    saving = tools.train(data_bin, tmp_path / "saving", "--dropout", "0.1", *RESUMABLE[name])
    assert tools.losses(plain) == tools.losses(saving)
    one, other = (torch.load(tmp_path / run / "checkpoint_last.pt")["model"] for run in ("plain", "saving"))
    assert_same(one, other)


def test_training_lowers_the_loss(data_bin, tmp_path):
    logged = tools.losses(tools.train(data_bin, tmp_path, updates=120))
    first, last = (sum(float(loss) for _, loss in part) / 10 for part in (logged[:10], logged[-10:]))
    assert last < first - 1.5


@pytest.mark.parametrize("name", ["adaptive", "tied", "bf16", "quadratic", "quadratic toeplitz", "global"])
def test_what_was_trained_with_an_option_evaluates_and_generates(data_bin, tmp_path, name):
    tools.train(data_bin, tmp_path, *OPTIONS[name])
    path = tmp_path / "checkpoint_last.pt"
    arguments = ("--tokens-per-sample", 24, "--batch-size", 4, "--gen-subset", "test")
    assert 50 < tools.perplexity(tools.call("eval-lm", data_bin, *evaluation(path), *arguments)) < 300
    output = generate(data_bin, path, "--beam", 3, "--prefix-size", 2, "--max-len-b", 20, "--batch-size", 5)
    model, task = load(path, data_bin)
    if name == "adaptive":
        assert len(tools.rows(output, "H")) == 12
    else:
        assert assert_scores_are_the_models([model], task.source_dictionary, output) == 12


@pytest.fixture
def kept(checkpoint, tmp_path):
    """A folder with an earlier checkpoint, which no mistake may touch."""
    folder = tmp_path / "kept"
    folder.mkdir()
    shutil.copy(checkpoint, folder / "checkpoint_last.pt")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_that_is_not_allowed_is_named_before_anything_is_trained(data_bin, kept, name):
    arguments, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        tools.train(data_bin, kept, *arguments, updates=9)


def test_an_adaptive_softmax_under_another_criterion_is_refused_at_once(data_bin, tmp_path):
    with pytest.raises(ValueError, match=r"--criterion cross_entropy .*allowed: adaptive_loss"):
        tools.train(data_bin, tmp_path, "--adaptive-softmax-cutoff", "50,100")


@pytest.mark.parametrize("option", UNKNOWN_CHOICES)
def test_an_unknown_choice_is_answered_with_the_known_ones(data_bin, kept, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        tools.train(data_bin, kept, option, "softmax", updates=9)
    assert stopped.value.code != 0
    message = capsys.readouterr().err
    assert re.search(rf"argument {option}: .*'softmax'.*choose from", message)


@pytest.mark.parametrize("attention", ["mixed_chunk", "quadratic"])
def test_a_row_longer_than_a_table_is_an_error_and_no_perplexity_of_one(data_bin, tmp_path, attention):
    """Only quadratic attention has such rows: the table of mixed_chunk spans its chunk."""
    tools.train(data_bin, tmp_path, "--attention", attention, "--relative-bias", "toeplitz")
    path = tmp_path / "checkpoint_last.pt"
    arguments = ("--gen-subset", "train", "--batch-size", 4, "--tokens-per-sample", 64)
    if attention == "mixed_chunk":
        assert tools.perplexity(tools.call("eval-lm", data_bin, *evaluation(path), *arguments)) > 50
    else:
        with pytest.raises(ValueError, match=r"row of 64 tokens is longer than the table .*limit is 32"):
            tools.call("eval-lm", data_bin, *evaluation(path), *arguments)


def test_a_checkpoint_of_another_architecture_is_refused(data_bin, tmp_path):
    transformer = (
        *("--arch", "transformer_lm", "--decoder-layers", "1", "--decoder-embed-dim", "16"),
        *("--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2"),
    )
    tools.train(data_bin, tmp_path, *transformer)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the options of this model: .*decoder\.layers\.0"):
        tools.train(data_bin, tmp_path, updates=9)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        ("--embed-dim", "16"),
        ("--layers", "3"),
        ("--layers", "1"),
        ("--attention-dim", "8"),
        ("--expansion-factor", "3"),
        ("--attention", "local"),
        ("--relative-bias", "toeplitz"),
    ],
    ids=" ".join,
)
def test_a_checkpoint_of_other_sizes_is_refused(data_bin, kept, change):
    with pytest.raises(ValueError, match=rf"{change[0]} {change[1]} \(trained with"):
        tools.train(data_bin, kept, *change, updates=9)


def test_another_chunk_size_of_a_table_is_refused(data_bin, tmp_path):
    table = ("--relative-bias", "toeplitz")
    tools.train(data_bin, tmp_path, *table)
    with pytest.raises(ValueError, match=r"--chunk-size 16 \(trained with 8\)"):
        tools.train(data_bin, tmp_path, *table, "--chunk-size", "16", updates=9)


def test_another_length_of_reference_is_refused(data_bin, tmp_path):
    tools.train(data_bin, tmp_path, "--attention", "quadratic")
    with pytest.raises(Exception, match=r"n_ref=9 .*allowed: 32|ensure that the architectures match"):
        tools.train(data_bin, tmp_path, "--attention", "quadratic", "--n-ref", "9", updates=9)


def test_a_missing_data_folder_is_named(kept, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tools.train(tmp_path / "nowhere", kept, updates=9)


def test_a_missing_split_is_named(data_bin, kept, tmp_path):
    folder = tmp_path / "bin"
    shutil.copytree(data_bin, folder)
    for path in folder.glob("train.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="train"):
        tools.train(folder, kept, updates=9)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_empty_split_is_named(data_bin, tmp_path, split):
    texts = {"train": tools.real_lines()[:100], "valid": tools.real_lines()[100:110], split: []}
    folder = write_data(tmp_path, data_bin, **texts)
    with pytest.raises(ValueError, match=rf"split '{split}' of .* is empty"):
        tools.train(folder, tmp_path / "saved")


def test_a_corpus_smaller_than_one_block_is_told_the_largest_block(data_bin, tmp_path):
    lines = tools.real_lines()
    folder = write_data(tmp_path, data_bin, train=lines[:2], valid=lines[2:30])
    tokens = sum(len(line.split()) + 1 for line in lines[:2])
    message = rf"split 'train' of .* has {tokens} tokens.*--tokens-per-sample 64.*allowed: at most {tokens}"
    with pytest.raises(ValueError, match=message):
        tools.train(folder, tmp_path / "saved", "--tokens-per-sample", "64")
    assert len(tools.losses(tools.train(folder, tmp_path / "saved", "--tokens-per-sample", tokens))) == 3


def write_data(folder, data_bin, **texts):
    """A data-bin of other texts with the dictionary of ``data_bin``."""
    tools.write_texts(folder, **texts)
    words = tools.preprocess_arguments(folder, list(texts))
    tools.call("preprocess", *words[: words.index("--nwordssrc")], "--srcdict", data_bin / "dict.txt")
    return folder / "bin"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--decoder-layers", "--layers"),
        ("--decoder-attention-heads=2", "--attention-dim"),
        ("--no-such", None),
    ],
)
def test_a_name_of_fairseqs_own_model_is_answered_with_ours(data_bin, tmp_path, capsys, theirs, ours):
    with pytest.raises(SystemExit):
        tools.train(data_bin, tmp_path, theirs, "4")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "unrecognized arguments: " + theirs in last
    assert (f" is {ours}" in last) if ours else last.endswith(f"{theirs} 4")


@pytest.mark.parametrize("words", [("--tokens-per-sample", "0"), ("--context-window", "1024")])
def test_rows_without_room_for_a_word_are_refused_by_name(checkpoint, data_bin, words):
    tool = ("--user-dir", tools.USER_DIR, "--task", "language_modeling", "--path", checkpoint, "--cpu")
    with pytest.raises(ValueError, match=rf"^{' '.join(words)} is not allowed.*; allowed: "):
        tools.call("eval-lm", data_bin, *tool, "--gen-subset", "valid", *words)
