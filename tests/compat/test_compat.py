"""Proves that prepare_host heals what breaks fairseq here, and that no checkpoint runs code."""

import argparse
import ast
import builtins
import functools
import importlib
import logging
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import fairseq
import numpy
import pytest
import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

from fairseq_flash._compat import checkpoints, messages, prepare_host
from support import tools
from support.tiny_fairseq import USER_DIR, run, write_data_bin

TINY = (
    *("--task", "language_modeling", "--arch", "transformer_lm", "--decoder-layers", "1"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2"),
    *("--tokens-per-sample", "16", "--batch-size", "8", "--lr", "1e-3", "--dropout", "0", "--cpu"),
    *("--no-epoch-checkpoints", "--log-format", "simple", "--num-workers", "0"),
)


class Payload:
    """A pickled object that makes a file when it is loaded without a check."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module", autouse=True)
def _ready_host():
    prepare_host()


@pytest.fixture(scope="module")
def data_bin(tmp_path_factory):
    return write_data_bin(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data_bin, tmp_path_factory):
    """A folder with checkpoints by fairseq-train, and what it printed; sgd, so a Namespace is in them."""
    folder = tmp_path_factory.mktemp("trained")
    result = train(data_bin, folder, "--max-update", "3")
    assert result.returncode == 0, result.stdout
    return folder, result.stdout


def train(data_bin, folder, *arguments):
    base = ["fairseq-train", data_bin, "--user-dir", USER_DIR, "--save-dir", folder, "--optimizer", "sgd"]
    return run([*base, *TINY, *arguments])


def write_changed(source: Path, target: Path, change) -> Path:
    """Copies a checkpoint with ``change`` applied to its dict."""
    state = torch.load(source)
    change(state)
    torch.save(state, target)
    return target


def payloads(marker: Path):
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch {marker}"),
        "exec": Payload(exec, code),
        "eval": Payload(eval, code),
        "getattr": Payload(getattr, Payload(builtins.__import__, "os"), "system"),
        "partial": functools.partial(eval, code),
    }


def write_malicious(trained, tmp_path, kind="os.system"):
    marker = tmp_path / "payload_ran"
    payload = payloads(marker)[kind]
    path = tmp_path / "malicious.pt"
    write_changed(
        trained[0] / "checkpoint_last.pt", path, lambda state: state["extra_state"].update(payload=payload)
    )
    return path, marker


def test_the_payload_of_these_tests_does_run_where_nothing_is_checked(trained, tmp_path):
    path, marker = write_malicious(trained, tmp_path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["os.system", "exec", "eval", "getattr", "partial"])
def test_a_checkpoint_with_code_is_refused_by_name_and_not_executed(trained, tmp_path, kind):
    path, marker = write_malicious(trained, tmp_path, kind)
    message = r"malicious\.pt.*refused and nothing in it was executed"
    with pytest.raises(pickle.UnpicklingError, match=message) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)


def test_evaluation_refuses_a_checkpoint_with_code(trained, data_bin, tmp_path):
    path, marker = write_malicious(trained, tmp_path)
    result = run(["fairseq-eval-lm", data_bin, "--user-dir", USER_DIR, "--path", path, "--cpu"])
    assert result.returncode != 0
    assert "malicious.pt' was refused" in result.stdout
    assert not marker.exists()


@pytest.mark.long
def test_generation_refuses_a_checkpoint_with_code(trained, data_bin, tmp_path):
    path, marker = write_malicious(trained, tmp_path)
    task = ["--task", "language_modeling", "--gen-subset", "valid"]
    result = run(["fairseq-generate", data_bin, "--user-dir", USER_DIR, "--path", path, "--cpu", *task])
    assert result.returncode != 0
    assert "malicious.pt' was refused" in result.stdout
    assert not marker.exists()


def test_resuming_refuses_a_checkpoint_with_code(trained, data_bin, tmp_path):
    path, marker = write_malicious(trained, tmp_path)
    result = train(data_bin, tmp_path / "new", "--max-update", "5", "--restore-file", path)
    assert result.returncode != 0
    assert "malicious.pt' was refused" in result.stdout
    assert not marker.exists()


def broadcast(monkeypatch, obj):
    """What a second process gets when the first broadcasts ``obj``; the wire is a list."""
    wire, sending = [], True

    def transfer(tensor, src, group):
        wire.append(tensor.clone()) if sending else tensor.copy_(wire.pop(0).view_as(tensor))

    monkeypatch.setattr(distributed_utils, "broadcast", transfer)
    monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 0 if sending else 1)
    device = torch.device("cpu")
    distributed_utils.broadcast_object(obj, 0, None, device)
    sending = False
    return distributed_utils.broadcast_object(None, 0, None, device)


def test_a_process_refuses_code_that_another_broadcasts(monkeypatch, tmp_path):
    marker = tmp_path / "payload_ran"
    with pytest.raises(pickle.UnpicklingError, match="another process sent was refused and nothing"):
        broadcast(monkeypatch, {"payload": payloads(marker)["os.system"]})
    assert not marker.exists()


def test_a_restored_checkpoint_reaches_the_other_processes_whole(monkeypatch, trained):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(trained[0] / "checkpoint_last.pt"))
    state["extra_state"]["best"] = numpy.float64(1.5)
    received = broadcast(monkeypatch, state)
    assert received["cfg"] == state["cfg"]
    assert isinstance(received["cfg"].optimizer, argparse.Namespace)
    assert received["extra_state"]["best"] == 1.5
    for name, tensor in state["model"].items():
        assert torch.equal(received["model"][name], tensor)


@pytest.mark.parametrize("score", [numpy.float64(0.1), numpy.float32(0.1), numpy.int64(7), numpy.bool_(True)])
def test_a_score_counted_with_numpy_survives_a_checkpoint(trained, tmp_path, score):
    path = tmp_path / "scored.pt"
    write_changed(trained[0] / "checkpoint_last.pt", path, lambda s: s["extra_state"].update(best=score))
    best = checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]["best"]
    assert best == score
    assert best.dtype == score.dtype


def test_a_big_endian_score_keeps_its_value(tmp_path):
    torch.save({"best": numpy.array([0.1], ">f8")[0:1].view(">f8")[0]}, tmp_path / "score.pt")
    assert torch.load(tmp_path / "score.pt")["best"] == 0.1


@pytest.mark.parametrize("kind", ["O", "V8", "M8", "U4"])
def test_no_numpy_type_other_than_numbers_is_restored(tmp_path, kind):
    torch.save({"kind": numpy.dtype(kind)}, tmp_path / "type.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "type.pt")


def test_exactly_the_harmless_classes_are_allowed():
    listed = torch.serialization.get_safe_globals()
    entries = [entry[0] if isinstance(entry, tuple) else entry for entry in listed]
    ours = {
        getattr(entry, "__name__", "Any") for entry in entries if not entry.__module__.startswith("torch.")
    }
    containers = {"Namespace", "DictConfig", "ListConfig", "AnyNode", "Metadata", "ContainerMetadata"}
    plain = {"defaultdict", "dict", "list", "int", "Any", "_TensorPlaceholder", "_NumberType", "_number"}
    assert ours == containers | plain


def test_a_cutoff_string_with_code_is_refused_and_not_executed(trained, tmp_path):
    marker = tmp_path / "payload_ran"

    def poison(state):
        state["cfg"]["model"]["adaptive_softmax_cutoff"] = f"__import__('os').system('touch {marker}')"

    path = write_changed(trained[0] / "checkpoint_last.pt", tmp_path / "poisoned.pt", poison)
    with pytest.raises(ValueError, match="was not executed"):
        checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert not marker.exists()


def test_every_module_of_fairseq_that_evaluates_strings_is_healed():
    root = Path(fairseq.__file__).parent
    left = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).with_suffix("")
        text = path.read_text(encoding="utf-8")
        if relative.parts[0] == "examples" or not re.search(r"(?<![\w.])eval\(", text):
            continue
        calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        if any(isinstance(function, ast.Name) and function.id == "eval" for function in calls):
            module = importlib.import_module("fairseq." + ".".join(relative.parts))
            if vars(module).get("eval") is not checkpoints._plain_value:
                left.append(module.__name__)
    assert left == []


@pytest.mark.parametrize(
    "text",
    [
        *("(0.9, 0.98)", "[0.9,0.98]", "5,10", "1e-3", "True", "None", "-1", "'x'", "{'a': [1]}", " [1]"),
        *("2 * [1]", "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"),
    ],
)
def test_a_plain_value_reads_as_eval_reads_it(text):
    assert checkpoints._plain_value(text) == eval(text.strip())


@pytest.mark.parametrize(
    "text", ["exit()", "[].append", "x", "2**9", "[0] * 100000000", "(", "1 if 1 else 2"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="was not executed"):
        checkpoints._plain_value(text)


def test_fairseq_still_reads_its_lists_and_booleans():
    assert utils.eval_str_list("5,10", type=int) == [5, 10]
    assert utils.eval_bool("False") is False
    assert utils.eval_bool(None, default=True) is True
    assert utils.eval_str_dict("{'a': 1}") == {"a": 1}


def parse(*arguments):
    return options.parse_args_and_arch(options.get_training_parser(), ["data", *TINY, *arguments])


def test_bf16_does_not_ask_for_a_tpu():
    assert parse("--bf16").bf16 is True
    assert parse("--bf16").tpu is False
    assert parse("--memory-efficient-bf16").tpu is False


def test_a_tpu_asked_for_stays():
    assert parse("--bf16", "--tpu").tpu is True
    assert parse("--tpu").tpu is True


@pytest.mark.long
def test_bf16_trains_on_a_cpu(data_bin, tmp_path):
    result = train(data_bin, tmp_path, "--bf16", "--max-update", "2")
    assert result.returncode == 0, result.stdout
    assert "num_updates 2" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the advice is for machines without a GPU")
def test_fp16_without_a_gpu_is_explained():
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"--fp16 needs a GPU.*--bf16.*--fp16-no-flatten-grads"):
        FP16Optimizer.build_fp32_params(None, [weight])
    assert len(FP16Optimizer.build_fp32_params(None, [weight], flatten=False)) == 1


def test_a_copy_that_is_killed_leaves_the_old_checkpoint(monkeypatch, tmp_path):
    (tmp_path / "new.pt").write_text("new" * 100)
    (tmp_path / "last.pt").write_text("old")

    def half_a_copy(source, target):
        Path(target).write_text(Path(source).read_text()[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", half_a_copy)
    with pytest.raises(KeyboardInterrupt):
        PathManager.copy(str(tmp_path / "new.pt"), str(tmp_path / "last.pt"), overwrite=True)
    assert (tmp_path / "last.pt").read_text() == "old"


def test_a_copy_replaces_the_old_checkpoint_and_leaves_nothing_else(tmp_path):
    (tmp_path / "new.pt").write_text("new")
    (tmp_path / "last.pt").write_text("old")
    assert PathManager.copy(str(tmp_path / "new.pt"), str(tmp_path / "last.pt"), overwrite=True)
    assert (tmp_path / "last.pt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "new.pt"]


def test_training_prints_no_warning_and_no_configuration(trained):
    assert "Warning" not in trained[1]
    assert "'common_eval'" not in trained[1]
    assert "task language_modeling, model transformer_lm, criterion cross_entropy" in trained[1]


def test_only_the_known_warnings_are_hidden():
    known = "'pin_memory' argument is set as true but no accelerator is found, then"
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.filterwarnings("default", category=DeprecationWarning)
        messages._silence_noise()
        warnings.warn_explicit(known, UserWarning, "file", 1, module="torch.utils.data.dataloader")
        assert seen == []
        warnings.warn_explicit(known, UserWarning, "file", 2, module="users.own")
        warnings.warn_explicit("another", UserWarning, "file", 3, module="torch.utils.data.dataloader")
    assert len(seen) == 2


def test_the_whole_configuration_is_logged_at_debug_level(monkeypatch):
    config = OmegaConf.create({"task": {"_name": "a"}})
    monkeypatch.setenv("LOGLEVEL", "debug")
    record = logging.LogRecord("fairseq_cli.train", logging.INFO, "", 1, config, None, None)
    assert logging.getLogger("fairseq_cli.train").filter(record)
    assert record.getMessage() == str(config)


def test_training_resumes_from_a_checkpoint_with_a_namespace(trained, data_bin, tmp_path):
    config = torch.load(trained[0] / "checkpoint_last.pt")["cfg"]
    assert isinstance(config["optimizer"], argparse.Namespace)
    shutil.copytree(trained[0], tmp_path / "copy")
    result = train(data_bin, tmp_path / "copy", "--max-update", "5")
    assert result.returncode == 0, result.stdout
    assert re.search(r"Loaded checkpoint .* @ 3 updates", result.stdout)
    assert "num_updates 5" in result.stdout


def test_sentences_as_blocks_need_no_old_numpy(data_bin):
    assert len(language_model_task(data_bin, "--sample-break-mode", "eos").dataset("valid")) == 20


def language_model_task(data_bin, *arguments, split="valid"):
    args = options.parse_args_and_arch(options.get_training_parser(), [str(data_bin), *TINY, *arguments])
    task = tasks.setup_task(convert_namespace_to_omegaconf(args).task)
    task.load_dataset(split)
    return task


def test_a_blank_line_is_continued_like_any_prompt(trained, data_bin, tmp_path):
    lines = ["a b c d e f", "", "a b"]
    prompts = write_data_bin(tmp_path, {"test": lines}, data_bin / "dict.txt")
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(trained[0] / "checkpoint_last.pt")], {"data": str(prompts), "sample_break_mode": "eos"}
    )
    task.load_dataset("test")
    dataset = task.dataset("test")
    sample = dataset.collater([dataset[index] for index in range(3)])
    generator = task.build_generator(models, argparse.Namespace(beam=3, max_len_a=0, max_len_b=12))
    hypotheses = task.inference_step(generator, models, sample, prefix_tokens=sample["target"][:, :4])
    assert [len(beam) for beam in hypotheses] == [3, 3, 3]
    prompted = hypotheses[sample["id"].tolist().index(0)][0]["tokens"][:4]
    assert torch.equal(prompted, sample["target"][sample["id"].tolist().index(0)][:4])


@pytest.mark.parametrize("text", ["\u2603 é, and é\u2603 again", "a plain <0x41> line", "x"])
def test_characters_written_as_bytes_are_read_as_characters(tmp_path, text):
    import sentencepiece
    from fairseq.data import data_utils
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

    (tmp_path / "text").write_text("\n".join(tools.real_lines()), encoding="utf-8")
    options = dict(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "model"), vocab_size=600)
    sentencepiece.SentencePieceTrainer.train(**options, byte_fallback=True, minloglevel=2)
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(tmp_path / "model.model")))
    pieces = bpe.encode(text)
    assert ("<0xE2>" in pieces.split()) == ("\u2603" in text)
    assert bpe.decode(pieces) == text
    assert data_utils.post_process(pieces, "sentencepiece") == text
    assert data_utils.post_process("a <0x41>", "@@ ") == "a <0x41>"


def test_preparing_twice_changes_nothing():
    def healed():
        filters = [logging.getLogger(name).filters for name in messages._CONFIG_LOGGERS]
        functions = [checkpoint_utils.load_checkpoint_to_cpu, options.parse_args_and_arch, PathManager.copy]
        return functions, [list(entries) for entries in filters], len(torch.serialization.get_safe_globals())

    before = healed()
    prepare_host()
    assert healed() == before


def test_hydra_does_not_log_the_names_of_its_jobs_and_logs_all_else(caplog):
    log = logging.getLogger("hydra.core.utils")
    with caplog.at_level(logging.DEBUG, logger=log.name):
        log.debug("Setting JobRuntime:name=UNKNOWN_NAME")
        log.debug("something else")
    assert caplog.messages == ["something else"]
