"""Losses as compiled graphs: what torch traces of them, without the GPU that runs its kernels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import assert_near, cell, cohort_of, trained
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from kdbench.engine.networks.network import compiled as compiled_call
from kdbench.engine.program import Cohort, Program
from kdbench.engine.workers.training import way_of
from kdbench.losses.ce import cross_entropy
from kdbench.losses.kd import kd
from kdbench.losses.nst import neuron_selectivity
from kdbench.losses.sp import similarity_preserving


def compiled(cohort: Cohort) -> Cohort:
    (one,) = cohort.cells
    for stage in one.member.spec.method.stages:
        for term in one.member.modules.terms_of(stage).values():
            term.compile_loss(one.member.spec.protocol.batch_size)
    return cohort


# Signs, maps of several sizes, sorted values, scheduled options, an option that is drawn, and a teacher that trains.
@pytest.mark.parametrize("method", ["ab_kd_ce", "at", "mlkd", "ctkd_lskd", "mgd", "dml", "wkd_l_f", "norm_kd"])
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
    said = "torch.compile failed on the loss 'kd': it is too clever; it runs eagerly"
    assert caplog.messages.count(said) == 1
    way = way_of(cohorts[1].cells[0].member, Program([cohorts[1]]))
    assert not way["compile"] and "loss 'kd': it is too clever" in way["not_compiled"]


def test_a_loss_whose_gradient_the_compiler_refuses_runs_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no kernel for this gradient")

    backend = aot_autograd(fw_compiler=lambda graph, examples: graph.forward, bw_compiler=refused)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    cohorts = [cohort_of([cell("kd", steps=3)], tmp_path / str(i)) for i in range(2)]
    trained(Program([cohorts[0]]))
    trained(Program([compiled(cohorts[1])]))
    assert_near(*cohorts, 0.0)
    said = "torch.compile failed on the loss 'kd': no kernel for this gradient; it runs eagerly"
    assert caplog.messages.count(said) == 1


def test_the_smaller_last_batch_of_an_epoch_is_not_worth_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cohort = compiled(cohort_of([cell("kd", steps=3, batch=100)], tmp_path))
    trained(Program([cohort]))
    assert len(cohort.batches.train) % 100 and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("loss", [similarity_preserving, neuron_selectivity])
def test_what_a_loss_computes_in_float32_has_its_gradient_in_float32(
    loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision leaves little of the differences between similarities."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    teacher = torch.randn(64, 32, 8, 8).relu()
    student = teacher + 0.1 * torch.randn_like(teacher)
    found = []
    for call, half in ((loss, False), (loss, True), (compiled_call(loss), True)):
        own = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            value = call(own, teacher)
        value.backward()
        assert own.grad is not None
        found.append(own.grad)
    exact, eager, by_graph = found
    assert all((gradient - exact).norm() < 1e-5 * exact.norm() for gradient in (eager, by_graph))


def test_a_loss_that_is_wrong_is_no_matter_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", refusing(RuntimeError("its own")))
    cohort = compiled(cohort_of([cell("kd", steps=3)], tmp_path))
    with pytest.raises(AssertionError):
        trained(Program([cohort]))
    assert "its own" in str(cohort.cells[0].failure)


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


def test_weights_that_are_not_finite_are_near_to_nothing(tmp_path: Path) -> None:
    one, other = (cohort_of([cell("kd", steps=1)], tmp_path / str(i)) for i in range(2))
    assert_near(one, other, 0.0)
    for cohort in (one, other):
        next(cohort.cells[0].member.student.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(AssertionError, match="kd: .* is off by inf"):
        assert_near(one, other, 1.0)
