"""Proves that an exported model computes in transformers what it computes here, and comes back bit by bit.

Errors are relative to the largest logit. Measured: below 20 epsilon of float64, and of float32.
"""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from fairseq import tasks
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.data import Dictionary
from sentencepiece import SentencePieceProcessor

from fairseq_flash import console
from fairseq_flash.export import export_checkpoint, import_folder
from fairseq_flash.export.read import save_checkpoint
from fairseq_flash.generation import encode
from fairseq_flash.generation.model import load_model
from fairseq_flash.models.flash_lm import FlashLanguageModel
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM
from support import contract, tools

transformers = pytest.importorskip("transformers")

TOLERANCE = 100 * contract.EPSILON
SINGLE = 100 * torch.finfo(torch.float32).eps
SIZES = ("--embed-dim", "16", "--layers", "3", "--attention-dim", "8", "--chunk-size", "4")
LONGEST = 19
PAD = 1
#: Every option that changes what is computed, in every value.
CAUSAL = {
    "mixed_chunk": (),
    "chunk_norm": ("--linear-norm", "chunk", "--norm", "scalenorm"),
    "toeplitz": ("--relative-bias", "toeplitz", "--norm", "rmsnorm"),
    "positions": ("--scaled-sin", "--expansion-factor", "3", "--share-decoder-input-output-embed"),
    "local": ("--attention", "local"),
    "global": ("--attention", "global"),
    "flash2": ("--shift-keys", "--linear-norm", "fading"),
    "shifted": ("--shift-keys", "--attention", "local"),
    "fading": ("--linear-norm", "fading", "--attention", "global"),
    "quadratic": ("--attention", "quadratic", "--n-ref", "7"),
    "quadratic_toeplitz": ("--attention", "quadratic", "--n-ref", "32", "--relative-bias", "toeplitz"),
}
MASKED = {
    **{name: CAUSAL[name] for name in ("mixed_chunk", "chunk_norm", "toeplitz", "local", "shifted")},
    "global": ("--attention", "global", "--shift-keys"),
    "quadratic": ("--attention", "quadratic"),
    "positions": ("--scaled-sin", "--expansion-factor", "3", "--untie-weights-roberta"),
    "quadratic_toeplitz": CAUSAL["quadratic_toeplitz"],
}
LENGTHS = (1, 3, 4, 7, LONGEST)
#: Of a card.
LONGER = "- It reads rows longer than those of its training; "


def checkpoint_of(folder, task, arch, *options):
    """A checkpoint whose every weight matters, beside its dictionary; and its model in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    contract.write_dictionary(folder / "dict.txt")
    cfg = contract.configure(folder, task, "--arch", arch, *SIZES, *options)
    model = contract.make_telling(tasks.setup_task(cfg.task).build_model(cfg.model)).float()
    save_checkpoint(folder / "checkpoint_best.pt", cfg, model)
    return folder / "checkpoint_best.pt", model.double()


def exported(folder, task, arch, *options):
    path, model = checkpoint_of(folder, task, arch, *options)
    export_checkpoint(path, folder / "hf")
    return model, folder / "hf"


def loaded(folder, kind="CausalLM", dtype=torch.float64):
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


@pytest.fixture(scope="module", params=CAUSAL)
def causal(request, tmp_path_factory):
    """Our model and that of transformers, in float64, and their folder."""
    folder = tmp_path_factory.mktemp("causal")
    model, written = exported(folder, "language_modeling", "flash_lm", *CAUSAL[request.param])
    return model, loaded(written), written


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """As ``causal``, of FLASH alone."""
    model, written = exported(tmp_path_factory.mktemp("flash"), "language_modeling", "flash_lm")
    return model, loaded(written), written


@pytest.fixture(scope="module")
def flash2(tmp_path_factory):
    """As ``causal``, of the architecture ``flash2_lm``."""
    model, written = exported(tmp_path_factory.mktemp("flash2"), "language_modeling", "flash2_lm")
    return model, loaded(written), written


def padded(lengths=LENGTHS, leading=True):
    """Rows of these lengths, padded to the longest, and two columns more on both sides."""
    tokens = torch.full((len(lengths), max(lengths) + 4), PAD)
    for row, length in enumerate(lengths):
        begin = tokens.shape[1] - 2 - length if leading else 2
        tokens[row, begin : begin + length] = contract.draw(1, length, seed=row)[0]
    return tokens


@torch.no_grad()
def assert_equal_logits(model, theirs, tokens, tolerance=TOLERANCE):
    expected = model(tokens)[0]
    for mask in (tokens.ne(PAD).long(), None):
        contract.assert_close(theirs(tokens, attention_mask=mask).logits, expected, tolerance)


@pytest.mark.parametrize("leading", [True, False])
def test_logits_are_ours_with_padding_on_either_side(causal, leading):
    model, theirs, written = causal
    assert_equal_logits(model, theirs, padded(leading=leading))
    single = loaded(written, dtype=torch.float32)
    assert_equal_logits(model.float(), single, padded(leading=leading), SINGLE)
    model.double()


@pytest.mark.parametrize("name", MASKED)
def test_masked_logits_are_ours(tmp_path, name):
    words = ("masked_lm", "flash_masked_lm", *MASKED[name])
    model, written = exported(tmp_path, *words)
    theirs = loaded(written, "MaskedLM")
    for leading in (True, False):
        assert_equal_logits(model, theirs, padded(leading=leading))


@pytest.mark.parametrize("leading", [0, 3])
@torch.no_grad()
def test_pieces_of_any_size_give_the_logits_of_whole_rows(causal, leading):
    theirs = causal[1]
    tokens = torch.cat((torch.full((2, leading), PAD), contract.draw(2, LONGEST)), dim=1)
    tokens[0, : leading + 2] = PAD
    mask = tokens.ne(PAD).long()
    whole = theirs(tokens, attention_mask=mask).logits
    for sizes in ([1] * tokens.shape[1], [7, 1, 1, 5, 1, 1, 1, 99], [tokens.shape[1]]):
        cache, pieces, seen = None, [], 0
        for size in sizes:
            piece = tokens[:, seen : seen + size]
            seen += piece.shape[1]
            found = theirs(piece, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            pieces.append(found.logits)
        contract.assert_close(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_padding_between_tokens_is_as_if_it_were_not_there(causal):
    theirs, tokens = causal[1], contract.draw(2, LONGEST)
    spread = torch.full((2, 2 * LONGEST), PAD)
    spread[0, ::2], spread[1, [5, *range(8, 7 + LONGEST)]] = tokens
    found = theirs(spread, attention_mask=spread.ne(PAD).long()).logits
    contract.assert_close(found[spread.ne(PAD)].view(2, LONGEST, -1), theirs(tokens).logits)


@torch.no_grad()
def test_the_state_does_not_grow_and_cannot_go_back(flash, flash2):
    s, c, e, layers = 8, 4, 32, 3
    for (_, theirs, _), more in ((flash, 0), (flash2, s)):
        sizes = []
        for length in (1, 9, 90):
            cache = theirs(contract.draw(1, length), use_cache=True).past_key_values
            sizes.append(sum(x.numel() for state in cache.states for x in state.values()))
        assert sizes == [layers * (s * e + c * (2 * s + e) + more)] * 3
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-1)


@torch.no_grad()
def test_rows_of_a_cache_are_picked_and_repeated(causal):
    theirs, tokens = causal[1], contract.draw(3, LONGEST)
    whole, order = theirs(tokens).logits, torch.tensor([2, 0])
    for pick, rows in (
        ("reorder_cache", order),
        ("batch_select_indices", order),
        ("batch_repeat_interleave", 2),
    ):
        cache = theirs(tokens[:, :9], use_cache=True).past_key_values
        getattr(cache, pick)(rows)
        picked = torch.arange(3).repeat_interleave(2) if isinstance(rows, int) else rows
        found = theirs(tokens[picked, 9:], past_key_values=cache).logits
        contract.assert_close(found, whole[picked, 9:])


@pytest.mark.parametrize(
    "how", [dict(), dict(num_beams=3), dict(do_sample=True), dict(num_beams=3, num_return_sequences=2)]
)
def test_generation_on_the_state_is_that_without(causal, how):
    theirs, tokens = causal[1], padded((5, 2, 9))[:, :-2]
    mask, written = tokens.ne(PAD).long(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        more = dict(max_new_tokens=11, attention_mask=mask, use_cache=use_cache, **how)
        written.append(theirs.generate(tokens, **more))
    assert torch.equal(*written)
    # A row alone, without padding, gives the same.
    if "do_sample" not in how:
        alone = theirs.generate(tokens[:1][mask[:1].bool()].unsqueeze(0), max_new_tokens=11, **how)
        assert written[0][0, tokens.shape[1] :].tolist()[: alone.shape[1] - 5] == alone[0, 5:].tolist()


def test_generation_goes_on_from_a_cache(flash):
    theirs, tokens = flash[1], contract.draw(1, 9)
    whole = theirs.generate(tokens, max_new_tokens=12, do_sample=False)
    cache = theirs(tokens[:, :7], use_cache=True).past_key_values
    assert torch.equal(
        theirs.generate(tokens, past_key_values=cache, max_new_tokens=12, do_sample=False), whole
    )


def test_greedy_text_is_that_of_fairseq(causal):
    model, theirs, written = causal
    task = load_model(written.parent, None)[1]
    generator = task.build_generator([model], contract.generation_settings("language_modeling"))
    generator.beam_size, generator.max_len_b = 1, LONGEST
    tokens = torch.cat((torch.tensor([[2]]), contract.draw(1, 5)), dim=1)
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([6])}}
    ours = generator.generate([model], sample, prefix_tokens=tokens[:, 1:], bos_token=2)[0][0][
        "tokens"
    ].tolist()
    found = theirs.generate(tokens, max_new_tokens=LONGEST, do_sample=False)[0, 1:].tolist()
    # fairseq writes </s> where it has to end, too.
    assert found[: len(ours) - 1] == ours[:-1]
    assert found[len(ours) - 1 :] == [2] or len(ours) > LONGEST


def test_a_checkpoint_comes_back_bit_by_bit(causal, tmp_path):
    model, _, written = causal
    import_folder(written, tmp_path / "back.pt")
    back, _, _ = load_model(tmp_path / "back.pt", None)
    expected = model.float().state_dict()
    model.double()
    found = back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert back.trained_with == model.trained_with
    assert (tmp_path / "dict.txt").read_bytes() == (written / "dict.txt").read_bytes()


def test_an_export_of_before_there_were_shifted_keys_is_read(flash, tmp_path):
    shutil.copytree(flash[2], tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    settings = json.loads(config.read_text())
    del settings["shift_keys"]
    config.write_text(json.dumps(settings))
    assert_equal_logits(flash[0], loaded(tmp_path / "old"), padded())
    import_folder(tmp_path / "old", tmp_path / "back" / "back.pt")
    back, _, _ = load_model(tmp_path / "back" / "back.pt", None)
    assert back.trained_with == flash[0].trained_with


def test_what_transformers_has_saved_comes_back(flash, tmp_path):
    loaded(flash[2], dtype=torch.float32).save_pretrained(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(flash[2], trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    import_folder(tmp_path / "saved", tmp_path / "back" / "back.pt")
    back, _, _ = load_model(tmp_path / "back" / "back.pt", None)
    for name, weight in back.named_parameters():
        assert torch.equal(weight.double(), dict(flash[0].named_parameters())[name]), name
    again = loaded(tmp_path / "saved")
    assert_equal_logits(flash[0], again, padded())


def test_a_masked_model_comes_back(tmp_path):
    model, written = exported(tmp_path, "masked_lm", "flash_masked_lm")
    import_folder(written, tmp_path / "back" / "back.pt")
    back, _, _ = load_model(tmp_path / "back" / "back.pt", None, (FlashMaskedLM,))
    for name, weight in back.named_parameters():
        assert torch.equal(weight.double(), dict(model.named_parameters())[name]), name


def test_it_needs_neither_fairseq_nor_us(flash):
    code = (
        "import sys; sys.modules['fairseq'] = sys.modules['fairseq_flash'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"where = dict(pretrained_model_name_or_path={str(flash[2])!r}, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(**where)\n"
        "prompt = AutoTokenizer.from_pretrained(**where)(['a b', 'c'], return_tensors='pt', padding=True)\n"
        "found = model.generate(**prompt, max_new_tokens=4)\n"
        "print(found.shape[0], found[1, :2].tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "2 [1, 2]", run.stderr


def test_it_trains_and_its_loss_is_the_cross_entropy(flash):
    theirs, tokens = loaded(flash[2]).train(), padded()
    labels = tokens.masked_fill(tokens.eq(PAD), -100)
    loss = theirs(tokens, labels=labels).loss
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["flash", "flash2"])
@torch.no_grad()
def test_half_precision_is_as_near_as_ours(request, arch, dtype):
    model, _, written = request.getfixturevalue(arch)
    tokens = contract.draw(2, LONGEST)
    expected = model(tokens)[0]
    ours = model.to(dtype)(tokens)[0].double() - expected
    model.load_state_dict(unrounded(model, written))
    half = loaded(written, dtype=dtype)
    steps, cache = [], None
    for column in tokens.split(1, dim=1):
        found = half(column, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        steps.append(found.logits)
    for logits in (half(tokens).logits, torch.cat(steps, dim=1)):
        assert (logits.double() - expected).abs().max() <= 2 * ours.abs().max()


def unrounded(model, written):
    """The weights before they were rounded; the model is in float64 again."""
    before = load_model(written.parent, None)[0].state_dict()
    model.double()
    return before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--block", "transformer"), "--block transformer cannot be exported; allowed: --block gau"),
        (
            ("--adaptive-softmax-cutoff", "8"),
            "--adaptive-softmax-cutoff 8 cannot be exported; allowed: without",
        ),
        (("--adaptive-input", "--adaptive-input-cutoff", "8"), "--adaptive-input True cannot be exported"),
        (("--output-dictionary-size", "12"), "--output-dictionary-size cannot be exported"),
    ],
)
def test_what_the_code_does_not_compute_is_refused_by_name(tmp_path, options, said):
    path, _ = checkpoint_of(tmp_path, "language_modeling", "flash_lm", *options)
    with pytest.raises(ValueError, match=said):
        export_checkpoint(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_files_are_never_overwritten(flash, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="holds files already"):
        export_checkpoint(flash[2].parent, tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        import_folder(flash[2], tmp_path / "mine")
    (tmp_path / "dict.txt").write_text("other 1\n")
    with pytest.raises(ValueError, match="is another one"):
        import_folder(flash[2], tmp_path / "new.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(model_type="bert"), "allowed: model_type 'fairseq_flash'"),
        (dict(architectures=["Bert"]), "FlashForMaskedLM"),
        (dict(chunk_size="4"), "chunk_size is '4'; allowed: int"),
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(norm="none"), "norm"),
        (dict(dropout="much"), "dropout"),
        (dict(hidden_size=32), "does not fit"),
    ],
)
def test_a_changed_configuration_is_refused_by_name(flash, tmp_path, change, said):
    for path in flash[2].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=said):
        import_folder(tmp_path, tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_a_damaged_file_of_weights_is_refused(flash, tmp_path):
    for path in flash[2].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(
                path.read_bytes()[:-100] if path.suffix == ".safetensors" else path.read_bytes()
            )
    with pytest.raises(ValueError, match="cannot be read"):
        import_folder(tmp_path, tmp_path / "back.pt")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A model of sentencepiece's pieces, exported, and the folder of its data."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(tools.real_lines()[:300]) + "\n")
    words = ("--text", folder / "text", "--output", folder / "bin", "--vocab-size", "400")
    prepared = tools.run("python", tools.REPOSITORY / "scripts" / "prepare_lm.py", *words)
    assert prepared.returncode == 0, prepared.stdout
    cfg = contract.configure(folder / "bin", "language_modeling", "--arch", "flash_lm", *SIZES)
    save_checkpoint(folder / "model.pt", cfg, tasks.setup_task(cfg.task).build_model(cfg.model))
    export_checkpoint(folder / "model.pt", folder / "hf", folder / "bin")
    return folder / "hf", folder / "bin"


@pytest.fixture(scope="module")
def pieces_trained(pieces, tmp_path_factory):
    """A checkpoint of fairseq-train on that data, and the folder of its data."""
    folder, data = tmp_path_factory.mktemp("trained"), pieces[1]
    arch = ("--arch", "flash_lm", *SIZES, "--share-decoder-input-output-embed")
    tools.train(data, folder, *arch, "--max-tokens", "256", "--lr", "0.01", updates=4)
    return folder / "checkpoint_best.pt", data


def test_pieces_have_the_indices_that_they_have_here(pieces):
    written, data = pieces
    tokenizer = transformers.AutoTokenizer.from_pretrained(written, trust_remote_code=True)
    dictionary = Dictionary.load(str(data / "dict.txt"))
    assert tokenizer.convert_ids_to_tokens(list(range(len(dictionary)))) == dictionary.symbols
    text = "the value of an object\nis  \u00e9\u4e2d its name\n\nthe end"
    ours = encode(text, dictionary, data / "sentencepiece.bpe.model")
    assert tokenizer(text).input_ids == [dictionary.eos(), *ours]
    assert tokenizer.decode(ours) == text.replace("  ", " ")


def test_a_masked_text_has_the_indices_that_it_has_here(tmp_path):
    _, written = exported(tmp_path, "masked_lm", "flash_masked_lm")
    hub = FlashMaskedLM.from_pretrained(str(tmp_path), "checkpoint_best.pt", str(tmp_path), bpe=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(written, trust_remote_code=True)
    for texts in (["a <mask> b zz c"], ["<mask>"], ["a b", "c <mask>"]):
        assert tokenizer(*texts).input_ids == hub.encode(*texts).tolist()
    assert tokenizer.mask_token_id == len(tokenizer) - 1 == len(hub.task.source_dictionary) - 1


def test_the_commands_export_and_import(flash, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for words in (
        ["export-hf", str(flash[2].parent), str(tmp_path / "hf")],
        ["import-hf", str(tmp_path / "hf"), str(tmp_path / "back" / "checkpoint_best.pt")],
        ["export-hf", str(tmp_path / "back"), str(tmp_path / "again")],
    ):
        monkeypatch.setattr(sys, "argv", ["fairseq-flash"])
        with pytest.raises(SystemExit) as ended:
            console.main(words)
        assert not ended.value.code, capsys.readouterr().err
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(SystemExit) as ended:
        console.main(["export-hf", str(tmp_path / "back"), str(tmp_path / "hf")])
    assert ended.value.code == 2
    assert "holds files already; allowed: a new or an empty folder" in capsys.readouterr().err


def test_rounded_weights_are_half_the_size_and_load_on_both_sides(pieces_trained, tmp_path, monkeypatch):
    """transformers in bfloat16, and ours by from_pretrained in float32: the same rounded numbers."""
    path, data = pieces_trained
    export_checkpoint(path, tmp_path / "whole", data)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["fairseq-flash"])
    words = ["export-hf", str(path), str(tmp_path / "hf"), "--data", str(data), "--dtype", "bfloat16"]
    with pytest.raises(SystemExit) as ended:
        console.main(words)
    assert not ended.value.code
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "hf")]
    assert sizes[1] < 0.55 * sizes[0] + 1000
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert theirs.dtype == torch.bfloat16
    import_folder(tmp_path / "hf", tmp_path / "back" / "checkpoint_best.pt")
    lm = FlashLanguageModel.from_pretrained(
        str(tmp_path / "back"),
        "checkpoint_best.pt",
        str(tmp_path / "back"),
        bpe="sentencepiece",
        sentencepiece_model=str(tmp_path / "back" / "sentencepiece.bpe.model"),
    )
    whole = load_model(path, data)[0].state_dict()
    for name, weight in lm.models[0].named_parameters():
        assert torch.equal(weight, whole[name].bfloat16().float()), name
    assert lm.sample("the", sampling=True, max_len_b=10)
    tokens = lm.encode("the end of it")[None]
    with torch.no_grad():
        contract.assert_close(theirs.float()(tokens).logits, lm.models[0](tokens)[0], SINGLE)


def test_the_card_tells_data_training_loss_and_limits(pieces_trained, flash, tmp_path):
    path, data = pieces_trained
    export_checkpoint(path, tmp_path / "hf", data, torch.bfloat16)
    card = (tmp_path / "hf" / "README.md").read_text()
    header = card.split("---")[1]
    assert "library_name: transformers\npipeline_tag: text-generation\n" in header
    counts = json.loads((data / "prepare.json").read_text())["splits"]["train"]
    assert f"- train: {counts['documents']:,} documents, {counts['tokens']:,} tokens, " in card
    assert "- 4 updates, each of 1 x 1 batches of at most 256 tokens and 4 rows\n" in card
    assert "- adam, rate 0.01, fixed\n- rows of 32 tokens\n" in card
    seen = re.search(r"\n- (\d+) tokens in all, (\S+) times the text\n- \S+ minutes, with validation", card)
    rows, length = 4 * 4 * 32, counts["tokens"]
    assert 0 < int(seen[1]) <= rows
    assert float(seen[2]) == pytest.approx(int(seen[1]) / length, rel=0.05)
    bits = load_checkpoint_to_cpu(str(path))["extra_state"]["val_loss"]
    assert f"- validation loss: {bits * math.log(2):.4g} nats a token, perplexity {2**bits:.4g}, " in card
    assert "weights in bfloat16." in card
    imported = (flash[2] / "README.md").read_text()
    assert "What it was trained on was not recorded" in imported
    assert "How it was trained is not in the checkpoint" in imported


@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        ((), ("- validation loss: 2.079 nats a token, perplexity 8, 1.5 bits a byte\n", LONGER), ()),
        (("--sentence-avg",), ("- its loss was not recorded\n",), ("nats", "perplexity", "bits a byte")),
        # fairseq reads one more than it is told.
        (
            ("--max-valid-steps", "2"),
            ("2.079 nats a token, perplexity 8, of the first 3 batches at most\n",),
            ("a byte",),
        ),
        (("--valid-subset", "test,valid"), ("perplexity 8, 6 bits a byte\n",), ()),
        (CAUSAL["quadratic"], (LONGER,), ()),
        (CAUSAL["toeplitz"], (LONGER,), ()),
        (CAUSAL["quadratic_toeplitz"], ("- It reads rows of at most 32 tokens.\n",), ("rows longer",)),
    ],
)
def test_the_card_claims_no_more_than_the_options_let_it(tmp_path, options, said, unsaid):
    path, _ = checkpoint_of(tmp_path, "language_modeling", "flash_lm", "--optimizer", "adam", *options)
    state = load_checkpoint_to_cpu(str(path))
    state["optimizer_history"][-1]["num_updates"], state["extra_state"]["val_loss"] = 4, 3.0
    torch.save(state, path)
    splits = {"valid": {"tokens": 10, "bytes": 20}, "test": {"tokens": 10, "bytes": 5}}
    (tmp_path / "prepare.json").write_text(json.dumps({"splits": splits}))
    export_checkpoint(path, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert all(text in card for text in said)
    assert not any(text in card for text in unsaid)


TASK = """
task: books
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def test_the_harness_finds_the_loss_of_fairseq(pieces, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written, data = pieces
    # With its line end, a text has the </s> that fairseq reckons in.
    lines = [line + "\n" for line in tools.real_lines()[300:312]]
    (tmp_path / "test.json").write_text("".join(json.dumps(dict(text=line)) + "\n" for line in lines))
    (tmp_path / "books.yaml").write_text(TASK.format(file=tmp_path / "test.json"))
    # The harness puts the first token in front of a text itself; two would be scored.
    first = "add_bos_token=False"
    model = f"pretrained={written},trust_remote_code=True,dtype=float32,max_length=512,{first}"
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=["books"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    bits = found["results"]["books"]["bits_per_byte,none"] * sum(len(line.encode()) for line in lines)
    dictionary, coded = data / "dict.txt", tmp_path / "lines"
    processor = SentencePieceProcessor(model_file=str(data / "sentencepiece.bpe.model"))
    coded.write_text("".join(" ".join(processor.encode_as_pieces(line.strip())) + "\n" for line in lines))
    words = ("--only-source", "--srcdict", dictionary, "--testpref", coded, "--destdir", tmp_path / "bin")
    tools.call("preprocess", *words, "--workers", "1")
    broken = ("--sample-break-mode", "eos", "--tokens-per-sample", "512", "--batch-size", "2", "--cpu")
    plug_in = ("--user-dir", tools.USER_DIR, "--path", written.parent / "model.pt", "--gen-subset", "test")
    output = tools.call("eval-lm", tmp_path / "bin", *plug_in, *broken, "--num-workers", "0")
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", output)[1])
    tokens = sum(len(line.split()) + 1 for line in coded.read_text().splitlines())
    assert bits / tokens == pytest.approx(loss, abs=1e-4)
