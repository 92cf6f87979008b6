"""Networks as graphs: the hooks' values, bit for bit, run no further than asked; and who cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shipped import REGISTRY
from tiny import TRANSFORMER

from kdbench.engine.computing.compute import Computing
from kdbench.engine.networks.build import build_extractor, build_model
from kdbench.engine.networks.network import Network, Normalizer
from kdbench.image_cards import Normalization
from kdbench.models.graph import Untraceable, traced
from kdbench.models.hooks import Extractor
from kdbench.models.points import LOGITS
from kdbench.models.probing import undisturbed
from kdbench.recipe.planning import plan

UNCHANGED = Normalizer(Normalization(mean=[0.0] * 3, std=[1.0] * 3), (32, 32), torch.device("cpu"))

SHAPE = (3, 32, 32)
OWN = ["wrn_10_2", "resnet20", "bss_resnet14", "crd_resnet20", "resnet8x4", "vgg8", "mobilenetv2_half"]
# Both overwrite hook points in place.
OVERWRITING = ["timm:resnet18", "torchvision:resnet18"]


def extractor(name: Any) -> Extractor:
    recipe: dict[str, Any] = {"data": "cifar10", "student": name, "protocol": "crd", "method": "ce"}
    spec = plan(recipe, REGISTRY).cells[0].spec
    return build_extractor(build_model(spec.student, spec.data), spec.student, spec.data)


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*OWN, *OVERWRITING, TRANSFORMER], ids=str)
def test_a_graph_gives_what_the_hooks_give(name: Any, training: bool) -> None:
    net = extractor(name)
    points = [*net.places, LOGITS]
    graph = traced(net, points, training, SHAPE)
    with undisturbed(net.model, training):
        expected = net(images(), points)
        expected = {point: value.clone() for point, value in expected.items()}
        values = graph.module(images())
    assert graph.last == LOGITS and set(graph.points) == set(points)
    for point, value in zip(graph.points, values, strict=True):
        assert torch.equal(value, expected[point]), point


@pytest.mark.parametrize("name", OVERWRITING)
def test_points_that_the_network_overwrites_are_copied(name: str) -> None:
    """Without the copy these would be what the in-place ReLU left, without negative values."""
    net = extractor(name)
    for module in net.model.modules():
        # timm's blocks begin as identities, whose sums are not negative.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.5)
    assert "layer2.preact" in net.overwritten(SHAPE)
    graph = traced(net, ["layer2.preact", LOGITS], False, SHAPE)
    with undisturbed(net.model, False):
        values = dict(zip(graph.points, graph.module(images()), strict=True))
    assert values["layer2.preact"].min() < 0


def test_a_graph_ends_at_the_last_point() -> None:
    """Batch norms behind it see nothing, in train mode, and its modules do not run."""
    net = extractor("wrn_10_2")
    graph = traced(net, ["layer1", "layer2"], True, SHAPE)
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    net.model.train()
    graph.module(images())
    changed = {
        name.split(".")[0] for name, value in net.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert graph.last == "layer2" and changed == {"block1", "block2"}
    # Which that is says the network, not the order of names: here a layer's last ReLU is its end.
    assert traced(extractor("resnet20"), ["layer2", "layer2.preact"], False, SHAPE).last == "layer2"


@pytest.mark.parametrize("name", ["timm:vgg11_bn", "timm:tf_efficientnetv2_b0"])
def test_what_cannot_be_traced_says_so_and_runs_with_hooks(name: str) -> None:
    net = extractor(name)
    with pytest.raises(Untraceable, match=name):
        traced(net, [LOGITS], True, SHAPE)
    network = Network(net, UNCHANGED, Computing(compile=True))
    network.prepare({frozenset({LOGITS}): 10}, (4, *SHAPE), training=False)
    assert not network.graphs and network.untraceable is not None and name in network.untraceable
    net.model.eval()
    assert network.step(images(), [LOGITS])[LOGITS].shape == (4, 10)


def test_a_graph_that_would_lose_an_operation_is_refused() -> None:
    """A tensor that is changed without its result being used vanishes from a pruned graph: the comparison tells."""

    class Sneaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            y.mul_(2.0)
            return y.mean((2, 3))

    with pytest.raises(Untraceable, match="other values"):
        traced(Extractor(Sneaky(), {}, "sneaky"), [LOGITS], False, SHAPE)


def prepared(uses: dict[frozenset[str], int], worth: int = 0) -> Network:
    network = Network(extractor("wrn_10_2"), UNCHANGED, Computing(compile=True, worth=worth))
    network.prepare(uses, (4, *SHAPE), training=True)
    return network


def test_sets_with_one_end_share_a_graph_and_others_end_earlier() -> None:
    kd, at, ab = frozenset({LOGITS}), frozenset({"layer1", "layer2", LOGITS}), frozenset({"layer1.preact", "layer2"})
    graphs = prepared({kd: 5, at: 5, ab: 5}).graphs
    assert graphs[kd] is graphs[at] and graphs[kd][0] == ["layer1", "layer2", LOGITS]
    assert graphs[ab][0] == ["layer1.preact", "layer2"]


def test_who_asks_for_less_than_was_expected_gets_the_graph_that_gives_more() -> None:
    """After a member of a cohort failed, or while another catches up."""
    kd, at = frozenset({LOGITS}), frozenset({"layer1", LOGITS})
    network = prepared({kd | at: 5})
    used: list[int] = []
    names, _ = network.graphs[kd | at]

    def graph(x: torch.Tensor) -> list[torch.Tensor]:
        used.append(len(x))
        return [torch.full((1,), float(i)) for i in range(len(names))]

    network.graphs = {kd | at: (names, graph)}
    assert network.step(images(4), [LOGITS])[LOGITS].item() == names.index(LOGITS)
    assert used == [4]
    network.step(images(4), ["layer2"])
    assert used == [4], "what the graph does not give is computed with hooks"


def test_what_is_used_too_briefly_is_not_compiled() -> None:
    kd, ab = frozenset({LOGITS}), frozenset({"layer2"})
    assert set(prepared({kd: 500, ab: 30}, worth=100).graphs) == {kd}


def test_other_batches_modes_and_plain_calls_do_not_use_the_graphs() -> None:
    """The last, smaller batch of an epoch, a stage that keeps the student in eval mode, and evaluation."""
    network = prepared({frozenset({LOGITS}): 5})

    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the graph was used")

    network.graphs = {frozenset({LOGITS}): ([LOGITS], never)}
    network.step(images(3), [LOGITS])
    network(images(4), [LOGITS])
    network.model.eval()
    network.step(images(4), [LOGITS])
    network.model.train()
    with pytest.raises(AssertionError, match="was used"):
        network.step(images(4), [LOGITS])
