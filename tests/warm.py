"""A Python that has imported kdbench: `python -m MODULE …` in forks of a waiting process, without seconds of imports.

What a command starts by `sys.executable` (workers) comes from the same place. Tests that kill or interrupt take the
real `sys.executable`: between a command and whoever started it there is a second process here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Imported by functions of kdbench when they are first called.
LATER = (
    "matplotlib.backends.backend_agg",
    "pandas",
    "scipy.stats",
    "sklearn.datasets",
    "timm",
    "torch.utils.tensorboard",
    "torchvision.models.feature_extraction",
)


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """Path of a program that takes the place of `python`, for `-m MODULE …` alone."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address, program = folder / "socket", folder / "python"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-SE", __file__, str(address)])} "$@"\n')
    program.chmod(0o755)
    # Its input ends with this process, however that goes.
    server = subprocess.Popen(
        [sys.executable, __file__, str(address), str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield str(program)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        shutil.rmtree(folder)


def serve(address: str, program: str) -> None:
    """Import what commands import, then fork for every request until the input ends."""
    import kdbench

    for module in pkgutil.walk_packages(kdbench.__path__, "kdbench."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LATER:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            carry_out(connection, program)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os.killpg(0, signal.SIGKILL)


def carry_out(connection: socket.socket, program: str) -> None:
    """In a fork: become the asked for process, and tell how it ended."""
    text, files, *_ = socket.recv_fds(connection, 16, 3)
    size = int(text)
    request = b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    asked = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [asked["folder"], *(path for path in paths if path not in sys.path)]
    importlib.invalidate_caches()
    sys.executable = program
    option, module, *arguments = asked["arguments"]
    assert option == "-m"
    sys.argv = [module, *arguments]
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    connection.sendall(str(code).encode())
    os._exit(code)


def ask(address: str, arguments: list[str]) -> int:
    """Have a command carried out with this process' files, folder and environment: its exit code."""
    asked = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    request = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        socket.send_fds(connection, [f"{len(request):16}".encode()], [0, 1, 2])
        connection.sendall(request)
        # Nothing where it was killed.
        return int(connection.recv(16) or 70)


if __name__ == "__main__":
    if sys.flags.no_site:
        os._exit(ask(sys.argv[1], sys.argv[2:]))
    serve(*sys.argv[1:])
