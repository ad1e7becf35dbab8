"""What every pass must keep to: declared order, a valid graph afterwards, a record of each step, the given program whole."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from eecompile.errors import PassError
from eecompile.passes import Lower, Normalize, Pass, PassResult, StagePass, check_order, facts, run_passes
from eecompile.program import History, Program, Refusal
from tests.passes.conftest import ORDER, Source, code, same_bits

FIXTURES = ["resnet", "lenet", "masked", "tagger", "sequence_first", "cells"]


@pytest.fixture(params=FIXTURES)
def any_source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.getfixturevalue(request.param)
    return found


def test_each_pass_leaves_the_program_it_was_given(any_source: Source) -> None:
    program = any_source.program()
    source = code(any_source.captured.graph_module)
    parameters = [id(p) for p in program.source.parameters()]
    for p in any_source.passes():
        before = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
        text = code(program.graph_module), len(program.graph_module.graph.nodes)
        after = run_passes(program, [p])
        assert {f.name: getattr(program, f.name) for f in dataclasses.fields(program)} == before
        assert (code(program.graph_module), len(program.graph_module.graph.nodes)) == text
        program = after
    assert code(any_source.captured.graph_module) == source
    assert program.source is any_source.captured.graph_module
    assert [id(p) for p in program.source.parameters()] == parameters


def test_every_level_computes_what_was_captured(any_source: Source) -> None:
    """With the exits closed, at every step, bit for bit, at sizes other than the example's."""
    final = any_source.upto("verify", threshold=2.0)
    outputs = len(final.signature.outputs)
    for rows in (1, 3, 7):
        flat = any_source.inputs(rows)
        with torch.no_grad():
            want = final.source(*flat)
            for snapshot in final.history:
                same_bits(snapshot.graph_module(*flat)[:outputs], want)


def test_the_history_holds_the_graph_after_each_pass(any_source: Source) -> None:
    program = any_source.upto("verify")
    history = program.history
    assert [s.name for s in history] == ORDER
    assert [s.level for s in history] == ["captured"] * 5 + ["marked", "staged", "schedule", "schedule"]
    assert history["insert_exits"].graph_module is program.marked
    assert history["stage"].graph_module is program.graph_module
    assert [s.modified for s in history][2:5] == [False] * 3
    assert history["insert_exits"].modified
    assert history["stage"].modified
    for before, after in zip(history, history[1:], strict=False):
        assert after.nodes_before == before.nodes_after == len(before.graph_module.graph.nodes)
        assert after.seconds >= 0
    assert all(s.summary for s in history[1:])
    assert set(program.refusals) >= {r for s in history for r in s.refusals}


def test_the_history_is_found_by_name_place_and_slice(resnet: Source) -> None:
    history = resnet.upto("find_cuts").history
    assert history["annotate"] is history[1]
    assert history[-1].name == "find_cuts"
    assert isinstance(history[1:3], History)
    assert [s.name for s in history[1:3]] == ["annotate", "find_blocks"]
    assert repr(history) == "History(normalize, annotate, find_blocks, find_cuts)"
    with pytest.raises(PassError, match=r"no such pass in the history(.|\n)*did you mean find_blocks"):
        history["find_block"]


@pytest.mark.parametrize("swapped", range(1, len(ORDER) - 1))
def test_a_wrong_order_is_refused_before_anything_runs(resnet: Source, swapped: int) -> None:
    """Each pass before the one that it needs; `annotate` alone needs nothing."""
    passes = resnet.passes()
    passes[swapped], passes[swapped + 1] = passes[swapped + 1], passes[swapped]
    ran: list[str] = []
    with pytest.raises(PassError, match=f"pass '{ORDER[swapped + 1]}' cannot run yet"):
        run_passes(resnet.program(), passes, ran.append)
    assert ran == []


def test_the_error_of_a_wrong_order_says_what_is_missing() -> None:
    with pytest.raises(PassError) as error:
        check_order([Lower()], frozenset({"marked"}))
    assert error.value.got == "marked"
    assert error.value.wanted == "staged"
    assert "earlier" in str(error.value.hint)
    check_order([StagePass(), Lower()], frozenset({"marked"}))


def test_every_pass_gives_what_it_promises(resnet: Source) -> None:
    program = resnet.program()
    for p in resnet.passes():
        assert p.requires <= program.history.facts
        program = run_passes(program, [p])
        assert p.ensures <= program.history.facts


@dataclasses.dataclass(frozen=True)
class Breaking(Pass):
    """A pass with a bug: it moves a user in front of what it uses."""

    name: ClassVar[str] = "breaking"

    def run(self, program: Program) -> PassResult:
        gm = facts.copy(program.graph_module)
        user = next(n for n in gm.graph.nodes if n.op == "call_function" and n.args[0].op == "call_function")
        user.args[0].prepend(user)
        return PassResult(program.replace(graph_module=gm), True)


def test_a_pass_that_breaks_the_graph_is_caught(resnet: Source) -> None:
    with pytest.raises(PassError, match="pass 'breaking' left an invalid graph"):
        run_passes(resnet.program(), [Normalize(), Breaking()])


@dataclasses.dataclass(frozen=True)
class Refusing(Pass):
    name: ClassVar[str] = "refusing"

    def run(self, program: Program) -> PassResult:
        return PassResult(program, False, (Refusal("here", "refusing", "too small"),), "nothing")


def test_refusals_are_kept_with_the_step_and_the_program(resnet: Source) -> None:
    program = run_passes(resnet.program(), [Refusing()])
    assert program.refusals == program.history["refusing"].refusals == (Refusal("here", "refusing", "too small"),)
    assert program.history["refusing"].summary == "nothing"
