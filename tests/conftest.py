"""Shared fixtures. Tests that need the real CIFAR-10 or the public teachers skip where these are not at hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from warm import warm_python

# Runs inherit what is ignored here: below nohup, a closed terminal would not end them, and tests would wait for ever.
# Of what a script starts with '&', an interrupt is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
END_TO_END = ROOT / "tests" / "e2e"
# Two cells of seconds, and their teacher.
TINY = (END_TO_END / "recipes" / "tiny.yaml", "--registry", END_TO_END / "registry")

# Where developers keep the data set and the public weights; both can be pointed elsewhere.
SHARED = Path(os.environ.get("KDBENCH_SHARED", ROOT.parent / "shared"))

Kdbench = Callable[..., subprocess.CompletedProcess[str]]
Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that a test runs in its own process changes how this answers signals, and its children inherit it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, answer in zip(numbers, before, strict=True):
        if answer is not None:
            signal.signal(number, answer)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run side by side: one thread each, and a home of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("KDBENCH_HOME", str(tmp_path_factory.getbasetemp() / "home"))
        patch.delenv("KDBENCH_DATA", raising=False)
        patch.delenv("KDBENCH_WEIGHTS", raising=False)
        yield


@pytest.fixture(autouse=True)
def same_beginning() -> None:
    """Every test begins alike: with one thread, and with the draws of one seed where it asks for none of its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def python(environment: None) -> Iterator[str]:
    """A Python that has imported already what kdbench imports; see `warm`."""
    with warm_python() as program:
        yield program


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder once, for all tests and for all processes that share them out: `once("name", make)` -> folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():
                (base / name).mkdir()
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder


@pytest.fixture(scope="session")
def command_line(python: str) -> Kdbench:
    """Runs the command in a given folder: `command_line("ls", "models", cwd=folder, code=0)` -> finished process."""

    def call(
        *arguments: str | Path, cwd: Path, code: int | None = 0, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [python, "-m", "kdbench", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"COLUMNS": "160"} | environment,
        )
        if code is not None:
            assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def kdbench(command_line: Kdbench, tmp_path: Path) -> Kdbench:
    """Runs the command in a fresh folder: `kdbench("run", "quickstart", code=0)` -> finished process."""
    return partial(command_line, cwd=tmp_path)


@pytest.fixture(scope="session")
def tiny_run(once: Once, command_line: Kdbench) -> Path:
    """A folder with a finished run of two methods and two seeds, `runs/tiny`, and its copy in `results/tiny`."""

    def make(folder: Path) -> None:
        few = ("seeds=2", "steps=12", "evaluations=3")
        done = command_line("run", *TINY, *few, "--jobs", "2", "--threads", "1", cwd=folder)
        assert "accuracy, last epoch" in done.stdout
        command_line("publish", "runs/tiny", cwd=folder)

    return once("tiny", make)


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds CIFAR-10 as an image folder, unpacked once."""
    if given := os.environ.get("KDBENCH_TEST_DATA"):
        return Path(given)
    unpack = SHARED / "data" / "unpack"
    if not unpack.is_file():
        pytest.skip(f"the real CIFAR-10 is not at hand: no {unpack}, and KDBENCH_TEST_DATA is not set")
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


def filled(file: Path) -> dict[str, Any]:
    """A record as plain data, with what follows from its resolved recipe and is not in its file."""
    from kdbench.record import read_record

    return read_record(file).model_dump(mode="json", by_alias=True)
