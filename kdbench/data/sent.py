"""Pictures on a node of a cluster: those that lie there already, and those that it is sent, told by their content.
Imports no torch.

A listing is a JSON file that says of every picture where it lies, its label and its sha256.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kdbench.data.sums import MOST_SUMS, Sum, sums_of
from kdbench.files import write_json
from kdbench.reading import read_as

SUFFIX = ".pictures.json"


class SentPictures(BaseModel):
    """A data set of pictures. train, test: (place, label, sha256) of each, in its order."""

    model_config = ConfigDict(extra="forbid")

    name: str
    classes: list[str]
    short_side: int
    origin: str
    train: list[tuple[str, int, Sum]]
    test: list[tuple[str, int, Sum]]

    def places(self) -> dict[str, Path]:
        """Where each picture lies, by its sha256."""
        return {digest: Path(place) for place, _, digest in (*self.train, *self.test)}


def read_listing(file: Path) -> SentPictures:
    return read_as(SentPictures, file, most=MOST_SUMS)


def settle(listing: Path, store: Path, cache: Path) -> list[str]:
    """Write beside a listing that of this node: pictures that lie in the same place with the same content stay there,
    all others are in a store, under their sha256.

    Returns:
        the sha256 of pictures that are in neither. Where there are any, nothing is written.
    """
    found = read_listing(listing)
    local = {digest: place for digest, place in found.places().items() if place.is_file()}
    sums = sums_of([*local.values()], cache, found.name)
    same = {digest: place for digest, place in local.items() if sums[place] == digest}
    places = {digest: same.get(digest, store / digest) for digest in found.places()}
    lacking = [digest for digest, place in places.items() if not place.is_file()]
    if not lacking:
        rows = {
            split: [(str(places[digest]), label, digest) for _, label, digest in getattr(found, split)]
            for split in ("train", "test")
        }
        write_json(here(listing), found.model_dump() | rows)
    return lacking


def here(listing: Path) -> Path:
    """The listing of a node, beside the one that it was sent."""
    return listing.with_name("here-" + listing.name)
