"""How fast pictures are read, cropped and resized on one core: our loader beside torchvision's, on made-up JPEGs."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from kdbench.data.augment import Augmentation
from kdbench.data.decoding import NUMBERS
from kdbench.data.streams import uniform
from kdbench.data.transforms import Transforms, rand_augment
from kdbench.engine.data.streamed import Drawn, Making, StreamedSplit, decoded

# As ImageNet's pictures are for the most part.
WIDTH, HEIGHT, QUALITY = 500, 375, 95
SIZE, AREA, PICTURES, BATCH = 224, (0.08, 1.0), 128, 32


@dataclass(frozen=True)
class Rates:
    """Images a second of each way, round by round; and the mean size of a file."""

    rates: dict[str, list[float]]
    kilobytes: float

    def table(self) -> str:
        """A line for each way: median, quartiles, and the cores that 1,000 images a second need."""
        rows = ["| way | images/s on one core, median | quartiles | cores for 1,000 images/s |", "|:--|--:|:--|--:|"]
        for name, rates in self.rates.items():
            # Within what was measured, however few rounds there were.
            low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75))
            rows.append(f"| {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {1000 / middle:.1f} |")
        return "\n".join(rows)


def made_up_pictures(folder: Path, pictures: int = PICTURES) -> list[Path]:
    """JPEGs of ImageNet's usual size, with detail of several scales so that files have about its usual 110 kB."""
    (folder / "all").mkdir(parents=True)
    files = []
    for number in range(pictures):
        random = np.random.default_rng(number)
        total = np.full((HEIGHT, WIDTH, 3), 128.0)
        for cells, strength in ((4, 60.0), (16, 30.0), (64, 16.0), (250, 11.0)):
            noise = random.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(noise[:, :, channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                total[:, :, channel] += strength * np.asarray(layer)
        files.append(folder / "all" / f"{number:04}.jpg")
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(files[-1], quality=QUALITY)
    return files


def measured(rounds: int, tell: Callable[[str], None]) -> Rates:
    """Every way in turns, one batch each: read, decode, RandomResizedCrop, mirror, bytes of a batch."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        files = made_up_pictures(Path(name))
        randomly = Transforms([("rand_augment", rand_augment())]), _MIRRORED
        ways = {
            "kdbench": ours(files, Making(AREA)),
            "kdbench, decoder: torchvision": ours(files, Making(AREA, "torchvision")),
            "kdbench, RandAugment": ours(files, Making(AREA, None, *randomly)),
            "the same, decoder: torchvision": ours(files, Making(AREA, "torchvision", *randomly)),
            "torchvision: ImageFolder (Pillow), transforms.v2": of_folder(Path(name), []),
            "torchvision: ImageFolder, RandAugment": of_folder(
                Path(name), [v2.RandAugment(2, 9, interpolation=_BILINEAR)]
            ),
            "torchvision.io.decode_image, transforms.v2": of_tensors(files),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, batches in ways.items():
                # Of the processor: other processes on the core do not count.
                begin = time.process_time()
                images = next(batches)
                seconds = time.process_time() - begin
                assert images.shape == (BATCH, 3, SIZE, SIZE) and images.dtype == torch.uint8
                if number:  # The first one warms up.
                    rates[way].append(BATCH / seconds)
            if number % 10 == 0:
                tell(f"round {number} of {rounds}")
        return Rates(rates, sum(file.stat().st_size for file in files) / len(files) / 1000)


_BILINEAR = v2.InterpolationMode.BILINEAR
_MIRRORED = Augmentation(flip=True)


def ours(files: list[Path], making: Making) -> Iterator[torch.Tensor]:
    """Batches as the streamed loader makes them."""
    split = StreamedSplit(files, torch.zeros(len(files), dtype=torch.int64), 256, SIZE, 3)

    def drawn() -> Iterator[Drawn]:
        for step in itertools.count():
            index = torch.arange(step * BATCH, (step + 1) * BATCH) % len(files)
            crops = uniform(BATCH * NUMBERS, 0, "crops", step).reshape(BATCH, NUMBERS).tolist()
            yield Drawn(index, index % 2, crops, range(step * BATCH, (step + 1) * BATCH))

    for one, images in decoded(split, making, drawn()):
        # Without transforms the device mirrors a whole batch.
        yield _MIRRORED.view(images, one.view) if making.transforms is None else images


def of_folder(folder: Path, more: list[v2.Transform]) -> Iterator[torch.Tensor]:
    """torchvision's data set and PyTorch's loader, in this process."""
    transform = v2.Compose([*_cropped(), *more, v2.PILToTensor()])
    loader = DataLoader(ImageFolder(str(folder), transform), BATCH, drop_last=True)
    while True:
        for images, _ in loader:
            yield images


def of_tensors(files: list[Path]) -> Iterator[torch.Tensor]:
    """torchvision's own decoder, and its transforms of tensors."""
    transform = v2.Compose(_cropped())
    endless = itertools.cycle(files)
    while True:
        chosen = itertools.islice(endless, BATCH)
        yield torch.stack([transform(decode_image(str(file), ImageReadMode.RGB)) for file in chosen])


def _cropped() -> list[v2.Transform]:
    return [v2.RandomResizedCrop(SIZE, AREA, interpolation=_BILINEAR, antialias=True), v2.RandomHorizontalFlip()]
