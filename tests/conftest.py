"""Shared fixtures. Tests that need the real CIFAR-10 or the public teachers skip where these are not at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Where developers keep the data set and the public weights; both can be pointed elsewhere.
SHARED = Path(os.environ.get("KDBENCH_SHARED", ROOT.parent / "shared"))

Kdbench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests run side by side: one thread each, and a home of their own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KDBENCH_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.delenv("KDBENCH_DATA", raising=False)
    monkeypatch.delenv("KDBENCH_WEIGHTS", raising=False)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def kdbench(tmp_path: Path) -> Kdbench:
    """Runs the command in a fresh folder: `kdbench("run", "quickstart", code=0)` -> finished process."""

    def call(
        *arguments: str | Path, code: int | None = 0, timeout: float = 300, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "kdbench", *map(str, arguments)],
            cwd=cwd or tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"COLUMNS": "160"} | environment,
        )
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds CIFAR-10 as an image folder, unpacked once."""
    if given := os.environ.get("KDBENCH_TEST_DATA"):
        return Path(given)
    unpack = SHARED / "data" / "unpack"
    if not unpack.is_file():
        pytest.skip(f"the real CIFAR-10 is not at hand: no {unpack}, and KDBENCH_TEST_DATA is not set")
    from filelock import FileLock

    root = Path(os.environ.get("TMPDIR", "/tmp")) / "kdbench-test-data"
    root.mkdir(exist_ok=True)
    with FileLock(root / ".lock"):
        subprocess.run([sys.executable, str(unpack), str(root)], check=True, capture_output=True)
    return root


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """Folder with the public CIFAR-10 teachers."""
    folder = Path(os.environ.get("KDBENCH_TEST_WEIGHTS", SHARED / "teachers"))
    if not folder.is_dir():
        pytest.skip(f"the public teachers are not at hand: no {folder}, and KDBENCH_TEST_WEIGHTS is not set")
    return folder
