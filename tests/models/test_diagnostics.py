"""Proves that diagnostics report what they say, when they say, and change no bit of the training."""

import io
import json
import math
from unittest import mock

import pytest
import torch
from fairseq.logging import metrics, progress_bar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairseq_flash.models._diagnostics import watch_layers
from fairseq_flash.modules import GatedAttentionUnit, RowMemory, align_rows
from support import tools
from support.tiny_fairseq import train_in_two

ON = ("--diagnostics-interval", "1")
TABLE = ("--relative-bias", "toeplitz")
SMALL = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16")
# float32 sums in another order; measured: 1.1 epsilons
TOLERANCE = 8 * torch.finfo(torch.float32).eps
SYSTEMS = {
    "flash_lm_tiny": {"branch", "gate_mean", "gate_std", "gate_negative", "sparsity"},
    "flash2_lm_tiny": {"branch", "gate_mean", "gate_std", "gate_negative", "sparsity"},
    "flash_quad_lm_tiny": {"branch", "gate_mean", "gate_std", "gate_negative", "sparsity"},
    "flash_local_lm_tiny": {"branch", "gate_mean", "gate_std", "gate_negative", "sparsity"},
    "flash_global_lm_tiny": {"branch", "gate_mean", "gate_std", "gate_negative"},
    "transformer_plus_lm_tiny": {"branch", "ffn_branch"},
    "transformer_pp_lm_tiny": {"branch", "ffn_branch", "gate_mean", "gate_std", "gate_negative"},
    "mc_transformer_pp_lm_tiny": {"branch", "ffn_branch", "gate_mean", "gate_std", "gate_negative"},
}


@pytest.fixture(scope="module")
def health():
    return tools.load_script("health")


def build(health, arch="flash_lm_tiny", *options):
    torch.manual_seed(1)
    return health.build(["--arch", arch, *SMALL, "--dropout", "0", *options], 60).double().train()


def report(model, tokens, update=0, **inputs):
    """What a forward pass of that update logs."""
    model.set_num_updates(update)
    with metrics.aggregate(new_root=True) as found:
        model(tokens, **inputs)
    return found.get_smoothed_values()


def random_tokens(*shape):
    return torch.randint(4, 60, shape)


def start_with_known_scores(layers):
    """Scores are the bias alone: above zero for a token with itself, below zero at any distance."""
    for block in layers:
        torch.nn.init.zeros_(block.offset_scale.gamma)
        table = block.bias.table.data
        table.fill_(-1.0)
        table[len(table) // 2] = 1.0


def share_of_distant(*lengths):
    """Of pairs (i, j <= i) within stretches of these lengths, those with j < i."""
    return sum(n * (n - 1) for n in lengths) / sum(n * (n + 1) for n in lengths)


@pytest.mark.parametrize("arch", SYSTEMS)
def test_every_system_reports_what_it_has(health, arch):
    chunks = () if arch == "transformer_plus_lm_tiny" else ("--chunk-size", "8")
    found = report(build(health, arch, *ON, *chunks), random_tokens(2, 20))
    assert set(found) == {f"{kind}/layer{index}" for kind in SYSTEMS[arch] for index in (0, 1)}
    assert all(math.isfinite(value) for value in found.values())


def test_sparsity_is_the_share_of_zeros_among_pairs_that_see_each_other(health):
    model = build(health, "flash_lm_tiny", *ON, "--chunk-size", "8", *TABLE)
    start_with_known_scores(model.decoder.stack.blocks)
    found = report(model, random_tokens(3, 20))
    assert found["sparsity/layer0"] == pytest.approx(share_of_distant(8, 8, 4), rel=1e-6)
    tokens = random_tokens(2, 20)
    tokens[1, 11:] = 1
    tokens[0, :2] = 1
    found = report(model, tokens, update=1)
    assert found["sparsity/layer1"] == pytest.approx(share_of_distant(8, 8, 2, 8, 3), rel=1e-6)


def test_sparsity_of_long_rows_is_taken_in_pieces(health):
    options = ("--attention", "quadratic", *TABLE, "--n-ref", "600")
    model = build(health, "flash_lm_tiny", *ON, *options)
    start_with_known_scores(model.decoder.stack.blocks)
    found = report(model, random_tokens(2, 600))
    assert found["sparsity/layer0"] == pytest.approx(share_of_distant(600), rel=1e-6)
    model = build(health, "flash_lm_tiny", *ON, "--chunk-size", "200", *TABLE)
    start_with_known_scores(model.decoder.stack.blocks)
    found = report(model, random_tokens(2, 600))
    assert found["sparsity/layer0"] == pytest.approx(share_of_distant(200, 200, 200), rel=1e-6)


def test_sparsity_of_rows_that_go_on_counts_from_their_own_chunks(health):
    model = build(health, "flash_lm_tiny", *ON, "--chunk-size", "8", *TABLE)
    start_with_known_scores(model.decoder.stack.blocks)
    memory = RowMemory()
    for update, lengths in enumerate([(5,), (3, 2)]):
        memory.announce(["a"], ["a"])
        found = report(model, random_tokens(1, 5), update, memory=memory)
        assert found["sparsity/layer0"] == pytest.approx(share_of_distant(*lengths), rel=1e-6)


def test_shifted_keys_of_rows_that_go_on_are_of_the_token_before(health):
    """Scores that depend on the base alone, of a row that its second half goes on with."""
    model, n = build(health, "flash2_lm_tiny", *ON, "--chunk-size", "64"), 24
    layer, tokens, memory, bases = model.decoder.stack.blocks[0], random_tokens(1, 2 * n), RowMemory(), []
    torch.nn.init.normal_(layer.offset_scale.gamma)
    torch.nn.init.zeros_(layer.bias.a)
    handle = layer.uvz.register_forward_hook(lambda module, args, output: bases.append(output))
    model(tokens)
    handle.remove()
    z = torch.nn.functional.silu(bases[0][..., 2 * layer.expanded_dim :])
    _, rows = align_rows(z, None, None, 16, torch.float64)
    (q, k), at = layer.copies(z, rows)[:2, :, n:], rows.positions.expand(1, -1)[:, n:]
    seen = layer.scores(q, k, (at, at), rows)[torch.ones(1, n, n).tril() == 1]
    for update, piece in enumerate(tokens.split(n, dim=1)):
        memory.announce(["a"], ["a"])
        found = report(model, piece, update, memory=memory)
    assert found["sparsity/layer0"] == pytest.approx((seen <= 0).double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("attention", ["mixed_chunk", "quadratic"])
def test_bidirectional_layers_count_pairs_in_both_directions(attention):
    torch.manual_seed(1)
    size = dict(embed_dim=32, attention_dim=16, chunk_size=8, n_ref=20)
    layer = GatedAttentionUnit(**size, attention=attention, causal=False, relative_bias="toeplitz")
    model = torch.nn.ModuleList([layer])
    model.forward = lambda x, rows: layer(x, rows=rows)
    watch_layers(model, model, 1)
    start_with_known_scores([layer])
    padding_mask = torch.arange(20).expand(2, 20) >= torch.tensor([[20], [11]])
    x, rows = align_rows(torch.randn(2, 20, 32), padding_mask, None, 16, torch.float32)
    model.diagnostics.set_num_updates(0)
    with metrics.aggregate(new_root=True) as found:
        model(x, rows)
    lengths = (8, 8, 4, 8, 3) if attention == "mixed_chunk" else (20, 11)
    share = sum(n * (n - 1) for n in lengths) / sum(n * n for n in lengths)
    assert found.get_smoothed_values()["sparsity/layer0"] == pytest.approx(share, rel=1e-6)


def test_flash_masked_lm_reports_too(data_bin, tmp_path):
    words = ("--task", "masked_lm", "--criterion", "masked_lm", "--arch", "flash_masked_lm_tiny", *SMALL, *ON)
    output = tools.train(data_bin, tmp_path, *words, updates=1)
    assert all(f'"{kind}/layer1"' in output for kind in SYSTEMS["flash_lm_tiny"])


@pytest.mark.parametrize("arch", ["flash_lm_tiny", "flash_quad_lm_tiny", "mc_transformer_pp_lm_tiny"])
def test_branches_are_those_of_the_health_report(health, arch):
    model, tokens = build(health, arch, *ON), random_tokens(2, 40)
    found = report(model, tokens)
    expected = {
        m.place: m.value for m in health.layer_ratios(model.decoder.stack, tokens) if "branch" in m.ratio
    }
    kinds = {"layer 0": "branch/layer0", "layer 1, feed-forward": "ffn_branch/layer1"}
    for place, key in kinds.items():
        assert (key in found) == (place in expected)
        if place in expected:
            assert found[key] == pytest.approx(expected[place], rel=TOLERANCE)


def test_gate_statistics_are_those_of_the_gate(health):
    model = build(health, "flash_lm_tiny", *ON)
    uvz = model.decoder.stack.blocks[0].uvz
    torch.nn.init.zeros_(uvz.weight)
    uvz.bias.data[:64] = torch.tensor([1.0, -2.0, -2.0, -2.0]).repeat(16)
    gate = torch.nn.functional.silu(torch.tensor([1.0, -2.0, -2.0, -2.0]).double()).repeat(4 * 16 * 10)
    found = report(model, random_tokens(4, 10))
    assert found["gate_mean/layer0"] == pytest.approx(gate.mean().item(), rel=TOLERANCE)
    assert found["gate_std/layer0"] == pytest.approx(gate.std().item(), rel=TOLERANCE)
    assert found["gate_negative/layer0"] == 0.75


def test_reports_come_at_the_interval_in_training_alone(health):
    model, tokens = build(health, "flash_lm_tiny", "--diagnostics-interval", "3"), random_tokens(2, 8)
    assert [bool(report(model, tokens, update)) for update in range(7)] == [True, False, False] * 2 + [True]
    assert not report(model, tokens, 6), "a second batch of the same update"
    assert not report(model.eval(), tokens, 9)
    model.train()
    with torch.no_grad():
        assert not report(model, tokens, 12)
    assert report(model, tokens, 15)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_off_means_no_hook_anywhere_and_between_reports_none_in_the_layers(health):
    model, tokens = build(health), random_tokens(2, 8)
    assert not hasattr(model, "diagnostics")
    assert not report(model, tokens)
    assert hooks(model) == 0
    model = build(health, "flash_lm_tiny", *ON)
    assert report(model, tokens)
    assert hooks(model) == 2
    assert hooks(model.decoder) == 0
    model.set_num_updates(1)
    with pytest.raises(ValueError, match="tokens has indices out of range"):
        model(tokens + 1000)
    assert hooks(model.decoder) == 0, "an error must not leave hooks behind"


def test_a_negative_interval_is_refused(health):
    with pytest.raises(ValueError, match="--diagnostics-interval -1 is not allowed; allowed: 0"):
        watch_layers(torch.nn.Linear(1, 1), [], -1)


@pytest.mark.parametrize(
    "options",
    [
        ("--arch", "flash_lm_tiny", "--chunk-size", "8"),
        ("--arch", "flash_lm_tiny", "--chunk-size", "8", "--checkpoint-activations"),
        ("--arch", "flash_quad_lm_tiny", "--update-freq", "2"),
        ("--arch", "mc_transformer_pp_lm_tiny", "--chunk-size", "8"),
    ],
    ids=lambda options: " ".join(options[1:]),
)
def test_training_is_the_same_to_the_last_bit(data_bin, tmp_path, options):
    states, logs = [], []
    for name, extra in (("off", ()), ("on", ("--diagnostics-interval", "2"))):
        tools.train(data_bin, tmp_path / name, *options, *SMALL, "--dropout", "0.1", *extra, updates=4)
        logs.append(
            tools.train(data_bin, tmp_path / name, *options, *SMALL, "--dropout", "0.1", *extra, updates=6)
        )
        states.append(torch.load(tmp_path / name / "checkpoint_last.pt"))
    assert tools.losses(logs[0]) == tools.losses(logs[1])
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for key, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][key]), key


def test_reports_reach_tensorboard_and_the_json_log(data_bin, tmp_path):
    board = tmp_path / "tensorboard"
    extra = ("--diagnostics-interval", "2", "--tensorboard-logdir", board)
    output = tools.train(data_bin, tmp_path / "run", *SMALL, "--chunk-size", "8", *extra, updates=5)
    lines = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '"num_updates"' in line]
    reported = {line["num_updates"]: line.get("branch/layer1") for line in lines if "loss" in line}
    assert [number for number, value in reported.items() if value is not None] == ["1", "3", "5"]
    assert not any("layer" in key for line in lines if "valid_loss" in line for key in line)
    events = EventAccumulator(str(board / "train_inner")).Reload()
    steps = [event.step for event in events.Scalars("sparsity/layer0")]
    assert steps == [1, 3, 5]
    assert all(0 <= event.value <= 1 for event in events.Scalars("sparsity/layer0"))


@pytest.fixture(autouse=True)
def fresh_boards(monkeypatch):
    """fairseq writes all trainings of a process to the folder of the first."""
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})


@pytest.mark.parametrize("shown", [("json",), ("simple",), ("tqdm",), ("tqdm", "--no-progress-bar")])
def test_between_two_reports_no_line_of_the_log_has_a_number_of_ours(data_bin, tmp_path, shown):
    board = tmp_path / "tensorboard"
    extra = ("--diagnostics-interval", "3", "--log-format", *shown, "--tensorboard-logdir", board)
    words = (*SMALL, "--chunk-size", "8", "--batch-size", "8", "--optimizer", "adam", *extra)
    with mock.patch("sys.stderr", new_callable=Terminal) as terminal:
        tools.train(data_bin, tmp_path / "run", *words, updates=5)
        # Resumed within an epoch, and over the end of one that is shorter than the interval.
        log = tools.train(data_bin, tmp_path / "run", *words, "--diagnostics-interval", "100", updates=99)
    lines = (log + terminal.getvalue()).replace("\r", "\n").splitlines()
    lines = [line for line in lines if "train_wall" in line or "gnorm" in line]
    assert any("branch/layer0" in line for line in lines)
    assert not all("branch/layer0" in line for line in lines)
    assert not [line for line in lines if "None" in line or "null" in line]
    steps = EventAccumulator(str(board / "train_inner")).Reload().Scalars("sparsity/layer0")
    assert all(math.isfinite(event.value) for event in steps)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_two_processes_report_what_the_first_one_sees(data_bin, tmp_path):
    result = train_in_two(data_bin, tmp_path, "--max-update", "2", "--log-interval", "1", *ON)
    assert result.returncode == 0, result.stdout
    assert all(f"{kind}/layer1" in result.stdout for kind in SYSTEMS["flash_lm_tiny"])
