"""Augmentation of batches against torchvision's transforms of single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from kdbench.data.augment import Augmentation, normalize
from kdbench.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
MODES = {"zero": "constant", "reflect": "reflect"}


def random_images(n: int, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_torchvision(image: torch.Tensor, padding: int, mode: str, dy: int, dx: int, flip: int) -> torch.Tensor:
    """Crop and mirror of one image as a PIL image, the way torchvision's CIFAR pipelines see it."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    picture = TF.crop(TF.pad(picture, padding, padding_mode=MODES[mode]), dy, dx, *array.shape[:2])
    picture = TF.hflip(picture) if flip else picture
    return TF.pil_to_tensor(picture)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_all_162_views_of_an_image_are_torchvisions(mode, device):
    augmentation = Augmentation(4, mode, True)
    assert augmentation.views == 162
    image = random_images(1)[0]
    batch = image.to(device).expand(162, 3, 32, 32)
    views = augmentation.view(batch, torch.arange(162, device=device)).cpu()
    for view_id in range(162):
        dy, dx, flip = view_id // 18, view_id // 2 % 9, view_id % 2
        assert torch.equal(views[view_id], by_torchvision(image, 4, mode, dy, dx, flip)), (dy, dx, flip)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 10)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding, flip", [(2, True), (3, False), (0, True)])
def test_other_shapes_with_a_draw_of_its_own_for_every_image(shape, mode, padding, flip):
    augmentation = Augmentation(padding, mode, flip)
    images = random_images(50, *shape)
    before = images.clone()
    ids = augmentation.draw(torch.Generator().manual_seed(1), 50)
    views = augmentation.view(images, ids)
    for i, (dy, dx, mirrored) in enumerate(zip(*(part.tolist() for part in augmentation.parts(ids)), strict=True)):
        assert torch.equal(views[i], by_torchvision(images[i], padding, mode, dy, dx, mirrored))
    assert torch.equal(images, before)
    assert views.dtype == torch.uint8 and views.is_contiguous()


def test_float_images_are_cropped_alike():
    augmentation = Augmentation(4, "reflect", True)
    images = random_images(20)
    ids = augmentation.draw(torch.Generator().manual_seed(2), 20)
    assert torch.equal(augmentation.view(images.float(), ids), augmentation.view(images, ids).float())


def test_images_in_another_memory_layout():
    augmentation = Augmentation(4, "zero", True)
    images = random_images(20)
    ids = augmentation.draw(torch.Generator().manual_seed(2), 20)
    assert torch.equal(
        augmentation.view(images.contiguous(memory_format=torch.channels_last), ids), augmentation.view(images, ids)
    )


def test_nothing_to_do_leaves_the_images():
    images, augmentation = random_images(3), Augmentation()
    assert augmentation.views == 1
    ids = augmentation.draw(torch.Generator().manual_seed(0), 3)
    assert ids.tolist() == [0, 0, 0] and torch.equal(augmentation.view(images, ids), images)


@pytest.mark.parametrize("padding, flip, views", [(4, True, 162), (4, False, 81), (0, True, 2), (1, True, 18)])
def test_views_are_numbered_one_to_one(padding, flip, views):
    augmentation = Augmentation(padding, "zero", flip)
    assert augmentation.views == views
    parts = augmentation.parts(torch.arange(views))
    assert len(set(zip(*(part.tolist() for part in parts), strict=True))) == views


def test_draws_are_uniform_and_independent():
    augmentation = Augmentation(4, "zero", True)
    ids = augmentation.draw(torch.Generator().manual_seed(3), 162_000)
    assert ids.dtype == torch.int64 and ids.device.type == "cpu"
    table = np.zeros((9, 9, 2))
    np.add.at(table, tuple(part.numpy() for part in augmentation.parts(ids)), 1)
    for counts in (table.sum((1, 2)), table.sum((0, 2)), table.sum((0, 1)), table.ravel()):
        assert stats.chisquare(counts).pvalue > 1e-3
    for axis in range(3):
        assert stats.chi2_contingency(table.sum(axis)).pvalue > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_same_distribution_as_torchvisions_random_transforms(mode):
    """Which of the 162 views torchvision's own random transforms show, against ours."""
    image = random_images(1, 1)
    augmentation = Augmentation(4, mode, True)
    views = augmentation.view(image.expand(162, 1, 32, 32), torch.arange(162))
    number = {view.numpy().tobytes(): i for i, view in enumerate(views)}
    assert len(number) == 162
    theirs = transforms.Compose(
        [transforms.RandomCrop(32, padding=4, padding_mode=MODES[mode]), transforms.RandomHorizontalFlip()]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        seen = [number[theirs(image[0]).numpy().tobytes()] for _ in range(6000)]
    ours = augmentation.draw(torch.Generator().manual_seed(5), 6000)
    table = np.stack([np.bincount(seen, minlength=162), np.bincount(ours.numpy(), minlength=162)])
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_images_of_other_channels_are_not_broadcast():
    for images, means in ((1, 3), (3, 1)):
        with pytest.raises(ValueError, match=f"images of {images} channels, and {means} means"):
            normalize(torch.zeros(2, images, 8, 8), [0.5] * means, [0.5] * means)


def test_reflection_wider_than_the_image():
    augmentation = Augmentation(8, "reflect", False)
    with pytest.raises(UserError, match="reflect padding 8 does not fit images of 8x8"):
        augmentation.view(random_images(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    assert augmentation.view(random_images(1, 1, 9, 9), torch.zeros(1, dtype=torch.int64)).shape == (1, 1, 9, 9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_has_torchvisions_bits(channels, device):
    images = torch.arange(256, dtype=torch.uint8).repeat(channels).view(channels, 16, 16).unsqueeze(0)
    mean, std = [0.4914, 0.4822, 0.4465][:channels], [0.2470, 0.2435, 0.2616][:channels]
    array = images[0].permute(1, 2, 0).numpy()
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(array)
    ours = normalize(images.to(device), mean, std)
    assert ours.dtype == torch.float32
    if device == "cpu":
        assert torch.equal(ours[0], theirs)
    torch.testing.assert_close(ours[0].cpu(), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(normalize(images.to(device), torch.tensor(mean).to(device), torch.tensor(std)), ours)
    # Pixel values, as generated images are, are not divided by 255.
    torch.testing.assert_close(normalize(images.to(device) / 255, mean, std), ours)
