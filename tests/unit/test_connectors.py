"""Connectors: shapes, initial values, what they cannot bridge, and RepDistiller's regressor on the same weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.connectors import conv, conv1x1_bn, conv_bn_relu

ALL = [conv1x1_bn, conv_bn_relu, conv]


def wave(*shape: int, step: float, start: float = 0.0) -> Tensor:
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return 2 * torch.sin(step * count + start).reshape(shape)


def fill(module: nn.Module) -> None:
    """The i-th parameter becomes a fixed wave that begins at i."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(wave(*parameter.shape, step=0.37, start=float(index)))


def kinds(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.children()]


@pytest.mark.parametrize("connector", ALL)
@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 4, 4), (5, 4, 4)), ((5, 4, 4), (3, 4, 4)), ((7,), (9,)), ((3, 1, 1), (5, 1, 1))]
)
def test_bridges_channels(connector, student, teacher):
    module = connector(student, teacher)
    assert module(torch.randn(6, *student)).shape == (6, *teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((3, 8, 8), (5, 4, 4), "Conv2d 3"),
        ((3, 4, 4), (5, 8, 8), "ConvTranspose2d 4"),
        ((3, 8, 8), (5, 6, 7), "Conv2d 3 2"),
        ((3, 8, 8), (5, 8, 8), "Conv2d 1"),
        ((3, 9, 9), (5, 4, 4), "Conv2d 6"),
        ((3, 8, 4), (5, 4, 4), "Conv2d 5 1"),
    ],
)
def test_regressor_of_the_usual_tables_resizes(student, teacher, kernel):
    module = conv_bn_relu(student, teacher)
    assert module(torch.randn(2, *student)).shape == (2, *teacher)
    name, *size = kernel.split()
    assert type(module[0]).__name__ == name and module[0].kernel_size == (int(size[0]), int(size[-1]))


@pytest.mark.parametrize(
    ("student", "teacher", "with_relu", "without", "parameters"),
    [
        ((3, 8, 8), (5, 4, 4), 85.32490728803967, 459.70595101742725, 150),
        ((3, 4, 4), (5, 8, 8), 361.64880701599054, 1838.8238541017952, 255),
        ((3, 8, 8), (5, 6, 7), 228.59559528381644, 1206.7280235403032, 105),
        ((3, 4, 4), (5, 4, 4), 79.7033083215359, 459.70464334238005, 30),
    ],
)
def test_regressor_equals_repdistillers(student, teacher, with_relu, without, parameters):
    # HobbitLong/RepDistiller b84f547, models/util.py ConvReg, run in float64 with weights and input filled likewise:
    # sum of squares of the output, with and without its ReLU.
    images = wave(2, *student, step=0.61)
    for relu, value in ((True, with_relu), (False, without)):
        module = conv_bn_relu(student, teacher, relu=relu).double()
        fill(module)
        assert module(images).square().sum().item() == pytest.approx(value, rel=1e-10)
        assert sum(p.numel() for p in module.parameters()) == parameters


def test_relu_only_where_asked_for():
    images = torch.randn(4, 3, 4, 4)
    assert conv_bn_relu((3, 4, 4), (5, 4, 4))(images).min() >= 0
    assert kinds(conv_bn_relu((3, 4, 4), (5, 4, 4))) == ["Conv2d", "BatchNorm2d", "ReLU"]
    for module in (
        conv_bn_relu((3, 4, 4), (5, 4, 4), relu=False),
        conv1x1_bn((3, 4, 4), (5, 4, 4)),
        conv((3, 4, 4), (5, 4, 4)),
    ):
        assert module(images).min() < 0
    assert not any(m.inplace for m in conv_bn_relu((3, 4, 4), (5, 4, 4)).modules() if isinstance(m, nn.ReLU))


def test_ab_connector_begins_as_the_official_one():
    torch.manual_seed(0)
    module = conv1x1_bn((256, 8, 8), (512, 8, 8))
    convolution, norm = module
    assert kinds(module) == ["Conv2d", "BatchNorm2d"] and convolution.bias is None
    assert convolution.kernel_size == (1, 1) and convolution.weight.shape == (512, 256, 1, 1)
    # 131072 draws of N(0, √(2 / 512)): the standard error of the mean is σ / 362, of the deviation σ / 512.
    sigma = math.sqrt(2 / 512)
    assert abs(convolution.weight.mean().item()) < 5 * sigma / 362
    assert convolution.weight.std().item() == pytest.approx(sigma, rel=5 / 512)
    assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_ab_connector_of_vectors_is_the_1x1_convolution():
    torch.manual_seed(0)
    vector = conv1x1_bn((6,), (4,))
    torch.manual_seed(0)
    image = conv1x1_bn((6, 1, 1), (4, 1, 1))
    values = torch.randn(5, 6)
    image[0].load_state_dict({"weight": vector[0].weight.detach()[:, :, None, None]})
    assert torch.allclose(vector(values), image(values[:, :, None, None])[:, :, 0, 0], atol=1e-6)
    assert kinds(vector) == ["Linear", "BatchNorm1d"] and vector[0].bias is None


def test_identity_where_equal_is_the_officials_choice_and_an_option():
    shape = (8, 4, 4)
    assert isinstance(conv1x1_bn(shape, shape), nn.Identity)
    assert kinds(conv1x1_bn(shape, shape, identity_if_equal=False)) == ["Conv2d", "BatchNorm2d"]
    assert len(conv_bn_relu(shape, shape)) == 3
    assert isinstance(conv_bn_relu(shape, shape, identity_if_equal=True), nn.Identity)
    assert len(conv_bn_relu(shape, (8, 2, 2), identity_if_equal=True)) == 3


def test_fitnets_regressor_is_one_convolution_of_the_size_difference():
    module = conv((3, 8, 8), (5, 5, 6))
    assert isinstance(module, nn.Conv2d) and module.kernel_size == (4, 3) and module.bias is not None
    assert module(torch.randn(2, 3, 8, 8)).shape == (2, 5, 5, 6)
    assert isinstance(conv((3,), (5,)), nn.Linear)


@pytest.mark.parametrize("connector", ALL)
def test_initial_values_come_from_the_default_generator_alone(connector):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in connector((3, 4, 4), (5, 4, 4)).parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("connector", "student", "teacher", "words"),
    [
        *[(c, (16, 192), (16, 384), "tokens (16, 192)") for c in ALL],
        *[(c, (8, 4, 4), (16, 384), "tokens (16, 384)") for c in ALL],
        *[(c, (8, 4, 4), (8,), "vector: (8, 4, 4), (8,)") for c in ALL],
        *[(c, (2, 8, 4, 4), (2, 8, 4, 4), "(2, 8, 4, 4)") for c in ALL],
        (conv1x1_bn, (8, 4, 4), (8, 8, 8), "4×4 is not 8×8"),
        (conv_bn_relu, (8, 4, 4), (8, 6, 6), "enlarge a map of 4×4 to 6×6"),
        (conv_bn_relu, (8, 8, 2), (8, 4, 4), "enlarge a map of 8×2 to 4×4"),
        (conv, (8, 4, 4), (8, 8, 8), "enlarge a map of 4×4 to 8×8"),
    ],
)
def test_what_cannot_be_bridged_is_said(connector, student, teacher, words):
    with pytest.raises(UserError) as error:
        connector(student, teacher)
    assert words in str(error.value)
