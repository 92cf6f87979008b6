"""Losses as compiled graphs: what torch traces of them, without the GPU that runs its kernels."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import assert_near, cell, cohort_of, trained
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from kdbench.engine.network import compiled as compiled_call
from kdbench.engine.program import Cohort, Program
from kdbench.losses.ce import cross_entropy
from kdbench.losses.kd import kd


def compiled(cohort: Cohort) -> Cohort:
    (one,) = cohort.cells
    for stage in one.member.spec.method.stages:
        for term in one.member.terms_of(stage).values():
            term.compile_loss()
    return cohort


# Signs, maps of several sizes, sorted values, scheduled options, an option that is drawn, and a teacher that trains.
@pytest.mark.parametrize("method", ["ab_kd_ce", "at", "mlkd", "ctkd_lskd", "mgd", "dml"])
def test_compiled_losses_train_as_eager_ones(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cohorts = [cohort_of([cell(method, steps=3, batch=8)], tmp_path / str(i)) for i in range(2)]
    trained(Program([cohorts[0]]))
    trained(Program([compiled(cohorts[1])]))
    assert_near(*cohorts, 1e-4)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert not [one.message for one in caplog.records if one.name == "kdbench"]


def refusing(error: Exception) -> Any:
    def compile(loss: Any, **options: Any) -> Any:
        def call(*values: Any, **more: Any) -> Any:
            raise error

        return call

    return compile


def test_a_loss_that_the_compiler_refuses_runs_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", refusing(Unsupported("it is too clever")))
    cohorts = [cohort_of([cell("kd", steps=3)], tmp_path / str(i)) for i in range(2)]
    trained(Program([cohorts[0]]))
    trained(Program([compiled(cohorts[1])]))
    assert_near(*cohorts, 0.0)
    said = "torch.compile failed on the loss 'kd', which runs eagerly: it is too clever"
    assert caplog.messages.count(said) == 1


def test_a_loss_that_is_wrong_is_no_matter_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", refusing(RuntimeError("its own")))
    (one,) = compiled(cohort_of([cell("kd", steps=3)], tmp_path)).cells
    call = one.member.stage.terms["kd"].call
    assert call is not None
    with pytest.raises(RuntimeError, match="its own"):
        call(torch.zeros(2, 10), torch.zeros(2, 10))


def test_a_loss_is_compiled_for_each_of_many_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    student, teacher = torch.randn(2, 4, 10)
    for temperature in range(1, 13):
        call = compiled_call(kd)
        torch.testing.assert_close(call(student, teacher, temperature), kd(student, teacher, temperature))
    assert counters["stats"]["unique_graphs"] == 12


@pytest.mark.slow
def test_two_backward_passes_go_through_a_compiled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of an optimizer that takes gradients of terms that read a teacher apart."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    logits = torch.randn(8, 10, requires_grad=True)
    loss = compiled_call(cross_entropy)(logits, torch.arange(8))
    loss.backward(retain_graph=True)
    loss.backward()
    assert logits.grad is not None
    once = (logits.detach().softmax(1) - torch.eye(10)[:8]) / 8
    torch.testing.assert_close(logits.grad, 2 * once)
