"""MIT indoor scenes (Quattoni and Torralba, CVPR 2009): 67 classes, 80 training and 20 test pictures of each."""

from pathlib import Path

from kdbench.data.listing import list_lines
from kdbench.data.pictures import Pictures, from_folders, gather, official_or_folders
from kdbench.errors import UserError, counted

LISTS = ("TrainImages.txt", "TestImages.txt")
_NAMES = ("mit67", "indoorCVPR_09", "mit_indoor_scenes")
_CLASSES = 67


def load(roots: list[Path], download: bool, cache: Path, *, short_side: int = 256) -> Pictures:
    """The official split, of which each line of a list names a picture: `<class>/<file>.jpg` below `Images/`.

    A folder `mit67/{train,test}/<class>/*` is taken as well. Nothing is downloaded: the pictures are for research only
    and come from their authors' page.

    Args:
        roots: searched for a folder mit67 or indoorCVPR_09 (the archive's) that holds Images/ and both lists.
        cache: folder for the files' sums.
        short_side: pixels to which the shorter side of a test picture is brought.

    Raises:
        UserError: no data, a list that names other things, a picture that is not there.
    """
    wanted = "indoorCVPR_09/{Images/<class>/*.jpg, TrainImages.txt, TestImages.txt} or mit67/{train,test}/<class>/*"
    absent = "the MIT indoor scenes are not here, and they cannot be downloaded by a program"
    place, official = official_or_folders(roots, _NAMES, lambda root: (root / "Images").is_dir(), absent, wanted)
    if not official:
        return from_folders(place, "mit67", cache, short_side)
    named = [_listed(place / name) for name in LISTS]
    classes = sorted({name.partition("/")[0] for names in named for name in names})
    if len(classes) != _CLASSES:
        what = f"the lists name {counted(len(classes), 'class')} instead of {_CLASSES}"
        raise UserError(what, where=str(place), hint="get the lists again")
    train, test = (
        [(place / "Images" / name, classes.index(name.partition("/")[0])) for name in names] for names in named
    )
    return gather("mit67", classes, train, test, cache, short_side, "official split (TrainImages.txt, TestImages.txt)")


def _listed(file: Path) -> list[str]:
    names = []
    for name, where in list_lines(file, "it lies beside the archive"):
        folder, slash, picture = name.partition("/")
        if not folder or not slash or not picture or ".." in name or "/" in picture:
            raise UserError("not a line <class>/<picture>", where=where, hint="get the list again")
        names.append(name)
    return names
