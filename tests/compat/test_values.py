"""Proves that an option of fairseq with a value that cannot be is refused by name before work begins."""

import re

import pytest
import torch
from fairseq import options

from fairseq_flash.models.flash_lm import FlashLanguageModel
from support import tools

LM = ("--task", "language_modeling")
LANGUAGES = ("--source-lang", "here", "--target-lang", "there")
SMOOTHED = ("--criterion", "label_smoothed_cross_entropy")

OF_ANY_TOOL = [
    "--max-tokens 0",
    "--max-tokens -1",
    "--batch-size 0",
    "--batch-size -2",
    "--num-shards 0",
    "--shard-id -1",
    "--shard-id 1",
    "--shard-id 2 --num-shards 2",
    "--required-batch-size-multiple 0",
    "--required-batch-size-multiple -1",
    "--num-workers -1",
    "--data-buffer-size -1",
    "--log-interval 0",
    "--seed -1",
    "--seed 4294901761",
]

OF_TRAINING = [
    *OF_ANY_TOOL,
    "--num-shards 2",
    "--max-tokens-valid 0",
    "--batch-size-valid -1",
    "--max-valid-steps 0",
    "--max-valid-steps -1",
    "--validate-interval 0",
    "--save-interval 0",
    "--save-interval -3",
    "--checkpoint-shard-count 0",
    "--distributed-world-size 0",
    "--max-epoch -1",
    "--max-update -1",
    "--stop-time-hours -2",
    "--clip-norm -0.5",
    "--clip-norm nan",
    "--update-freq 0",
    "--update-freq 2,-1",
    "--lr -1",
    "--lr 0.1,-0.1",
    "--weight-decay -1",
    "--weight-decay nan",
    "--adam-eps 0",
    "--adam-eps nan",
    "--adam-betas (2,3)",
    "--adam-betas (0.9,0.98,1)",
    "--adam-betas 0.9",
    "--adam-betas (-0.5,0.9)",
    "--adam-betas x",
    "--momentum -1 --optimizer sgd",
    "--warmup-updates -1",
    "--warmup-updates 0 --lr-scheduler inverse_sqrt",
    "--total-num-update 0 --lr-scheduler polynomial_decay",
    "--power -1 --lr-scheduler polynomial_decay --total-num-update 9",
    "--lr-shrink 0",
    "--ema-decay 1.5 --store-ema",
    "--ema-decay nan --store-ema",
    "--ema-update-freq 0 --store-ema",
    "--ema-start-update -1 --store-ema",
    "--ema-decay 0.5",
    "--ema-start-update 3",
    "--patience 3 --disable-validation",
    "--optimizer-overrides x",
    "--optimizer-overrides [1]",
]

OF_MODELS = {
    "flash_lm": [
        "--label-smoothing 1.5 --criterion label_smoothed_cross_entropy",
        "--label-smoothing -0.1 --criterion label_smoothed_cross_entropy",
        "--ignore-prefix-size -1 --criterion label_smoothed_cross_entropy",
        "--rdrop-alpha -1 --criterion label_smoothed_cross_entropy_with_rdrop",
        "--tokens-per-sample 0",
        "--tokens-per-sample -7 --sample-break-mode eos",
    ],
    "flash_masked_lm": [
        *(f"--mask-prob {value}" for value in ("0", "1", "1.5", "-0.1", "nan")),
        *(f"--leave-unmasked-prob {value}" for value in ("1", "1.5", "-0.5", "0.95")),
        *(f"--random-token-prob {value}" for value in ("1.5", "-0.1", "0.95")),
        "--mask-multiple-length 0",
        "--mask-stdev -1",
        "--mask-whole-words",
        "--tokens-per-sample 1",
    ],
    "flash_seq2seq": [
        "--label-smoothing 2",
        "--max-source-positions 0",
        "--max-target-positions -1",
        "--upsample-primary 0",
        "--num-batch-buckets -1",
        "--eval-bleu-args x --eval-bleu",
        "--eval-bleu-args [1] --eval-bleu",
        '--eval-bleu-args {"beem":3} --eval-bleu',
        '--eval-bleu-args {"beam":0} --eval-bleu',
        "--eval-bleu-detok x --eval-bleu",
        "--eval-bleu-detok moses",
        "--eval-bleu-remove-bpe sentencepiece",
        "--eval-bleu-print-samples",
    ],
}
#: What is refused as another option, or as what it is a part of.
AS = {
    '--eval-bleu-args {"beam":0} --eval-bleu': "--beam 0",
    "--eval-bleu-detok x --eval-bleu": "tokenizer 'x'",
}

OF_GENERATION = [
    *OF_ANY_TOOL,
    "--num-shards 2 --shard-id 1",
    "--beam 0",
    "--nbest 0",
    "--max-len-a -1",
    "--max-len-a nan",
    "--min-len -1",
    "--min-len 50 --max-len-b 10",
    "--min-len 1 --max-len-b 0",
    "--lenpen nan",
    "--unkpen nan",
    "--temperature 0",
    "--temperature nan",
    "--prefix-size -1",
    "--no-repeat-ngram-size -1",
    "--diverse-beam-groups 0",
    "--diverse-beam-groups -2",
    "--diverse-beam-groups 3 --beam 5",
    "--diverse-beam-strength 0.7",
    "--diversity-rate -2",
    "--diversity-rate nan",
    "--lm-weight 0.5",
    "--lm-weight nan",
    "--iter-decode-max-iter 3",
    "--iter-decode-eos-penalty 1",
    "--iter-decode-with-beam 2",
    "--iter-decode-force-max-iter",
    "--sampling-topk 3 --sampling-topp 0.5 --sampling --nbest 5",
]

OF_EVALUATION = [
    *OF_ANY_TOOL,
    "--context-window -1",
    "--context-window -5 --sample-break-mode eos",
    "--context-window 32 --tokens-per-sample 32",
    "--context-window 40 --tokens-per-sample 32 --sample-break-mode eos",
    "--softmax-batch -1",
]


@pytest.fixture
def refused(robustness):
    def check(tool, *words, named):
        option = AS.get(named, named.partition(" --")[0])
        with robustness.attempt("values that options of fairseq cannot have"):
            with pytest.raises(ValueError, match=r"allowed") as caught:
                tools.call(tool, *words, *named.split())
            said = str(caught.value)
            assert option in said, said
            assert "\n" not in said
            assert len(said) < 600

    return check


@pytest.mark.parametrize("named", OF_TRAINING)
def test_training_refuses_what_cannot_be(refused, words_of_training, tmp_path, named):
    words = (*words_of_training["flash_lm"], "--save-dir", tmp_path / "save", "--max-update", 2)
    refused("train", *words, named=named)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("model", "named"), [(model, named) for model, options in OF_MODELS.items() for named in options]
)
def test_training_of_each_model_refuses_what_cannot_be(refused, words_of_training, tmp_path, model, named):
    refused("train", *words_of_training[model], "--save-dir", tmp_path, "--max-update", 2, named=named)


@pytest.mark.parametrize("tool", ["generate", "interactive"])
@pytest.mark.parametrize("named", OF_GENERATION)
def test_generation_refuses_what_cannot_be(refused, parallel, trained, tool, named):
    words = (parallel, "--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_seq2seq"], *LANGUAGES)
    refused(tool, *words, named=named)


@pytest.mark.parametrize("named", OF_EVALUATION)
def test_evaluation_refuses_what_cannot_be(refused, data_bin, trained, named):
    words = (data_bin, "--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_lm"], *LM)
    refused("eval-lm", *words, named=named)


@pytest.mark.parametrize("named", [*OF_ANY_TOOL, "--tokens-per-sample 0"])
def test_validation_refuses_what_cannot_be(refused, data_bin, trained, named):
    words = (data_bin, "--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_lm"], *LM)
    refused("validate", *words, *(() if "batch" in named else ("--batch-size", 2)), named=named)


@pytest.mark.parametrize("option", ["lenpen", "unkpen", "temperature"])
def test_the_hub_refuses_what_cannot_be(data_bin, trained, option):
    path = trained["flash_lm"]
    interface = FlashLanguageModel.from_pretrained(str(path.parent), path.name, str(data_bin))
    with pytest.raises(ValueError, match=f"--{option} nan is not allowed; allowed: "):
        interface.sample("the", **{option: float("nan")})


def test_values_at_the_edge_of_what_is_allowed_train(words_of_training, tmp_path):
    edges = "--max-valid-steps 1 --clip-norm inf --lr 0 --weight-decay 0 --adam-eps 1e-30"
    edges += " --ema-decay 1 --store-ema --seed 4294901760 --warmup-updates 0 --optimizer-overrides {}"
    words = (*words_of_training["flash_lm"], *SMOOTHED, "--label-smoothing", 0, *edges.split())
    assert len(tools.losses(tools.call("train", *words, "--save-dir", tmp_path, "--max-update", 2))) >= 2


@pytest.mark.parametrize("model", OF_MODELS)
def test_minus_one_switches_limits_off(words_of_training, tmp_path, model):
    def weights(*limits):
        words = (*words_of_training[model], *limits, "--save-dir", tmp_path / limits[1], "--max-update", 2)
        tools.call("train", *words)
        return torch.load(tmp_path / limits[1] / "checkpoint_last.pt")["model"]

    zero, minus = (weights("--clip-norm", n, "--stop-time-hours", n) for n in ("0", "-1"))
    assert all(torch.equal(weight, minus[name]) for name, weight in zero.items())


@pytest.mark.parametrize(
    ("task", "arch"), [("audio_finetuning", "wav2vec_ctc"), ("audio_pretraining", "wav2vec2")]
)
def test_a_share_of_masks_of_another_task_is_its_own(tmp_path, task, arch):
    words = (tmp_path, "--user-dir", tools.USER_DIR, "--task", task, "--arch", arch, "--mask-prob", 0)
    words = (*words, *(("--w2v-path", "x", "--criterion", "ctc") if arch == "wav2vec_ctc" else ()))
    parsed = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    assert parsed.mask_prob == 0


def test_values_at_the_edge_of_what_is_allowed_generate(parallel, trained):
    words = (parallel, "--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_seq2seq"], *LANGUAGES)
    edges = "--max-len-a 1 --max-len-b -1 --min-len 0 --lenpen 0 --unkpen inf --prefix-size 0"
    parts = "--batch-size 3 --distributed-world-size 2 --distributed-rank 1 --diverse-beam-groups -1"
    output = tools.call("generate", *words, *edges.split(), *parts.split())
    assert len(tools.rows(output, "H")) == 6


def test_shards_of_an_evaluation_make_the_whole(data_bin, trained):
    words = (data_bin, "--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_lm"], *LM)
    words = (*words, "--sample-break-mode", "eos", "--batch-size", 3)

    def tokens(*shard):
        return int(re.search(r"Evaluated (\d+) tokens", tools.call("eval-lm", *words, *shard))[1])

    assert sum(tokens("--num-shards", 2, "--shard-id", number) for number in (0, 1)) == tokens()
