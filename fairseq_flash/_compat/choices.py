"""What is chosen by name: a task, a criterion, subwords; names that are unknown, or go with another model."""

from collections.abc import Callable, Container
from typing import Any

from fairseq_flash._compat.healing import check_first, wrap

__all__ = ["known_name", "prepare"]


def prepare() -> None:
    """Applies every healing of this file."""
    _name_what_is_unknown()
    _refuse_another_task()
    _refuse_other_criterions()
    _refuse_other_models()


def _name_what_is_unknown() -> None:
    """Says which tokenizer, subword model or criterion nobody has registered; else it is a KeyError."""
    from fairseq import criterions, registry
    from fairseq.data import encoders

    def heal(kind: str) -> Callable:
        def heal_build(build: Callable) -> Callable:
            def healed(cfg: Any, *args: Any, **kwargs: Any) -> Any:
                known = registry.REGISTRIES[kind]["registry"]
                name = cfg if isinstance(cfg, str) else getattr(cfg, "_name", getattr(cfg, kind, None))
                if name is not None and name not in known:
                    raise ValueError(f"{kind} {name!r} is unknown; allowed: {', '.join(sorted(known))}")
                return build(cfg, *args, **kwargs)

            return healed

        return heal_build

    wrap(criterions, "build_criterion", heal("criterion"))
    wrap(encoders, "build_tokenizer", heal("tokenizer"))
    wrap(encoders, "build_bpe", heal("bpe"))


def _refuse_another_task() -> None:
    """Says that task and criterion are the checkpoint's, and others of the command line are ignored.

    So ``fairseq-validate --task flash_language_modeling --carry-state`` evaluated a checkpoint of
    ``language_modeling`` in blocks, without a word. Other tools pass them on from ``--model-overrides`` only.
    """
    from fairseq import checkpoint_utils
    from fairseq.criterions import CRITERION_REGISTRY
    from fairseq.tasks import TASK_REGISTRY

    registered = {"task": TASK_REGISTRY, "criterion": CRITERION_REGISTRY}

    def heal(load: Callable) -> Callable:
        def healed(path: Any, arg_overrides: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
            state = load(path, arg_overrides, *args, **kwargs)
            given = arg_overrides or {}
            # Validation names the task, and then needs the criterion.
            for part, known in registered.items() if isinstance(given.get("task"), str) else ():
                name = known_name(path, part, state["cfg"], known)
                if given.get(part, name) != name:
                    raise ValueError(
                        f"--{part} {given[part]} is not allowed with {path!r}, a checkpoint of "
                        f"--{part} {name}, which fairseq-validate and --model-overrides cannot change; "
                        "allowed: that one, or --task with fairseq-eval-lm"
                    )
            return state

        return healed

    wrap(checkpoint_utils, "load_checkpoint_to_cpu", heal)


def known_name(path: Any, part: str, cfg: Any, known: Container[str]) -> str:
    """What a checkpoint's configuration chooses; else fairseq 0.12 ends in a KeyError without a file.

    Args:
        path: Of the checkpoint.
        part: Of the configuration.
        cfg: All of it.
        known: The names that are registered.

    Raises:
        ValueError: it names none of them.
    """
    options = cfg.get(part)
    older = "arch" if part == "model" else part
    name = getattr(options, "_name", None) or getattr(options, older, None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"checkpoint {str(path)!r} is refused: its {part} is {str(name)[:100]!r}, which is unknown; "
            "allowed: those of fairseq, of this package and of --user-dir"
        )
    return name


def _refuse_other_criterions() -> None:
    """Says before anything is built that a criterion of fairseq's cannot go with one of our models.

    Some fail with an AttributeError before the first update, an AssertionError without text or a RuntimeError
    about sizes. Some train what they should not: that of alignments without ``--load-alignments``, as if it
    were another; ``cross_entropy`` divides the loss of masked words by the number of all; and a causal model
    of ``--task masked_lm`` sees the words. Criterions and tasks of the user's own are the user's.
    """
    from fairseq.trainer import Trainer

    def heal_init(init: Callable) -> Callable:
        def healed(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
            # The model has refused what its options cannot be, an adaptive softmax among them.
            _check_criterion(cfg, built=True)
            init(self, cfg, *args, **kwargs)

        return healed

    check_first(_check_criterion)
    wrap(Trainer, "__init__", heal_init)


def _check_criterion(cfg: Any, built: bool = False) -> None:
    from fairseq.criterions import CRITERION_REGISTRY
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.tasks import TASK_REGISTRY
    from fairseq.tasks.sentence_prediction import SentencePredictionTask
    from fairseq.tasks.sentence_ranking import SentenceRankingTask

    model, criterion, task = (getattr(cfg, part, None) for part in ("model", "criterion", "task"))
    name, chosen = getattr(criterion, "_name", None), ARCH_MODEL_REGISTRY.get(getattr(model, "_name", None))
    kind = TASK_REGISTRY.get(getattr(task, "_name", None))
    tasks = getattr(chosen, "allowed_tasks", None)
    # Those of fairseq.benchmark measure speed, on rows that mean nothing.
    made_up = getattr(kind, "__module__", "").startswith("fairseq.benchmark.")
    if tasks is not None and _of_fairseq(kind) and not made_up and task._name not in tasks:
        raise ValueError(
            f"--task {task._name} is not allowed with this model; allowed: {', '.join(sorted(tasks))}"
        )
    allowed = getattr(chosen, "allowed_criterions", None)
    if allowed is None or not _of_fairseq(CRITERION_REGISTRY.get(name)):
        return
    if getattr(model, "adaptive_softmax_cutoff", None) is not None:
        allowed = ("adaptive_loss",) if built else ("adaptive_loss", *allowed)
    if name not in allowed:
        raise ValueError(
            f"--criterion {name} is not allowed with this model; allowed: {', '.join(allowed)} "
            "(adaptive_loss goes with --adaptive-softmax-cutoff)"
        )
    # The other way round the task's options have no criterion to come from, which fairseq says.
    own = {"sentence_prediction": SentencePredictionTask, "sentence_ranking": SentenceRankingTask}
    if name in own and _of_fairseq(kind) and not issubclass(kind, own[name]):
        fitting = ", ".join(one for one in allowed if one not in own or issubclass(kind, own[one]))
        raise ValueError(f"--criterion {name} is not allowed with --task {task._name}; allowed: {fitting}")
    loss = getattr(model, "vocabulary_loss", None)
    if loss not in (None, "plain") and name != "cross_entropy":
        raise ValueError(
            f"--vocabulary-loss {loss} has no effect with --criterion {name}; "
            "allowed: --criterion cross_entropy"
        )


def _refuse_other_models() -> None:
    """Says that a model, such as that of a checkpoint, predicts no next word; any version.

    fairseq 0.12 asks for its targets, which an encoder-decoder has not: an AttributeError.
    """
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal(build: Callable) -> Callable:
        def healed(self, args: Any, *others: Any, **kwargs: Any) -> Any:
            try:
                return build(self, args, *others, **kwargs)
            except (AttributeError, ValueError) as error:
                if not any(said in str(error) for said in ("supported_targets", "language modeling target")):
                    raise
                raise ValueError(
                    f"--task language_modeling is not allowed with a model of {getattr(args, '_name', args)} "
                    f"({error}); allowed: models of the next word, such as flash_lm"
                ) from None

        return healed

    wrap(LanguageModelingTask, "build_model", heal)


def _of_fairseq(kind: Any) -> bool:
    return getattr(kind, "__module__", "").startswith(("fairseq.", "fairseq_flash."))
