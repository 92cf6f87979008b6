"""The sha256 of pictures, which are read once for it. Imports no torch."""

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kdbench.errors import UserError
from kdbench.files import cores, sha256_of, sha256_of_data, write_json
from kdbench.reading import read_as

logger = logging.getLogger("kdbench")

# Bytes of a file of sums at most: millions of pictures.
MOST_SUMS = 1 << 30
Sum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def sums_of(files: list[Path], cache: Path, name: str) -> dict[Path, str]:
    """sha256 of every file, kept in the cache for files whose place, size and time have not changed."""
    try:
        stamps = [[str(file), (status := file.stat()).st_size, status.st_mtime_ns] for file in files]
    except OSError as error:
        raise UserError(
            f"a listed picture cannot be read: {error.strerror}", where=str(error.filename), hint="unpack it again"
        ) from None
    kept = cache / f"{name}-{sha256_of_data(sorted(stamps))[:32]}.json"
    with suppress(UserError, KeyError):
        known = read_as(dict[str, Sum], kept, most=MOST_SUMS) if kept.exists() else {}
        return {file: known[str(file)] for file in files}
    with ThreadPoolExecutor(cores()) as pool:
        sums = dict(zip(files, pool.map(sha256_of, files), strict=True))
    try:
        write_json(kept, {str(file): digest for file, digest in sums.items()})
    except OSError as error:
        logger.warning("%s: the files' sums could not be kept for the next run (%s)", kept, error)
    return sums
