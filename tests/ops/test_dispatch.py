"""Proves that one place chooses an implementation, and that a refusal gives every reason there is."""

import types

import pytest

from fairseq_flash.ops import dispatch


@pytest.fixture
def candidates(monkeypatch):
    """Three implementations: two that object, as often as they are told, and one that never does."""

    def candidate(name, *reasons):
        return types.SimpleNamespace(run=lambda *arguments: name, objections=lambda *arguments: list(reasons))

    found = {
        "fast": candidate("fast", "too wide", "on a cpu"),
        "slow": candidate("slow"),
        "last": candidate("last"),
    }

    def module(name):
        return ["no module named fast"] if found[name] is None else found[name]

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {name: name for name in found})
    monkeypatch.setattr(dispatch, "BACKENDS", ("auto", *found))
    monkeypatch.setattr(dispatch, "_module", module)
    return found


def test_auto_takes_the_first_without_objections(candidates):
    assert dispatch.choose("auto")() == "slow"
    candidates["fast"].objections = lambda: []
    assert dispatch.choose("auto")() == "fast"


def test_a_name_insists_and_gives_all_of_its_reasons(candidates):
    assert dispatch.choose("last")() == "last"
    with pytest.raises(ValueError, match=r"^backend='fast' cannot run: too wide; on a cpu; allowed: auto$"):
        dispatch.choose("fast")


def test_where_none_can_run_all_reasons_of_all_candidates_are_given(candidates):
    for name in ("slow", "last"):
        candidates[name].objections = lambda name=name: [f"{name} is tired"]
    every = (
        "^backend='fast' cannot run: too wide; on a cpu. backend='slow' cannot run: slow is tired. "
        "backend='last' cannot run: last is tired$"
    )
    with pytest.raises(ValueError, match=every):
        dispatch.choose("auto")


def test_a_candidate_that_cannot_be_imported_is_passed_over_and_says_so(candidates):
    candidates["fast"] = None
    assert dispatch.choose("auto")() == "slow"
    with pytest.raises(ValueError, match="backend='fast' cannot run: no module named fast"):
        dispatch.choose("fast")


def test_candidates_are_asked_about_what_they_are_given(candidates):
    candidates["fast"].objections = lambda projected, options: [f"{projected} and {options}"]
    with pytest.raises(ValueError, match="tensors and sizes"):
        dispatch.choose("fast", "tensors", "sizes")


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; allowed: auto, .*reference"):
        dispatch.check_backend("cuda")


def test_a_module_that_lacks_something_says_what(monkeypatch):
    monkeypatch.setattr(dispatch, "_modules", {})
    assert dispatch._module("fairseq_flash.ops.nothing") == ["No module named 'fairseq_flash.ops.nothing'"]


@pytest.mark.parametrize("path", [*dispatch.IMPLEMENTATIONS.values(), *dispatch.STEPS.values()])
def test_every_implementation_that_is_offered_exists(path):
    module = dispatch._module(path)
    assert callable(module.run)
    assert callable(module.objections)
