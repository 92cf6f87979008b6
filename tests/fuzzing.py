"""Recipes and run folders that are wrong in ways nobody thought of: none may give a traceback, hang, or lack a message.

    python tests/fuzzing.py recipes 10000 --seed 1      python tests/fuzzing.py folders 2000 --seed 1

Shipped recipes, and the folder of a finished run, are changed at random places. What fails is kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kdbench.tree import walk

ROOT = Path(__file__).parent.parent
# Seconds of work that one input may take, and by the clock, of which a busy machine takes many.
LIMIT, LATEST = 20.0, 300.0

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e308, -1e308, 10**9, 10**18, 10**30, 10**400, 1e-30, 1e30,
    float("inf"), float("nan"), "", "x", "kd", "ab", "at", "ce", "bss", "rco", "uda_kd", "fitnets", "✓ü\u202e", "\x00",
    "a" * 5000, "1e-3", "50%", "-5%", "150%", "nan%", "${x}", "../../etc/passwd", "/dev/zero", "~", "os:system", "{}",
    "{depth}", "wrn_0_0", "wrn_16_0", "wrn_10_2", "wrn_999999_1", "wrn_10_999999", "wrn_99999999999999999999_1",
    "resnet8", "resnet20", "vgg8", "timm:", "timm:nonsense", "timm:vit_tiny_patch16_224", "torchvision:resnet18",
    "torchvision:", [], {}, [None], [[]], [{}], [1, [2, [3]]], [0, 1], {"name": None}, {"name": ""}, {"": 1},
    {"name": "kd", "label": 3}, {"name": "kd", "label": ""}, {"name": {"name": "kd"}}, {"name": "kd", "stages": []},
    {"name": "kd", "stages": [{"name": "a"}]}, {"name": "kd", "stages": {"classification": None}}, {"name": "linear"},
    {"a": {"b": {"c": []}}}, list(range(50)), "epoch", {"name": "cosine", "at": [1]}, "1.5", "0x10", "12:30:45",
    "2020-01-01", datetime.date(2020, 1, 1), "equal", "halving", "layer1", "layer2.preact", "pooled", "logits",
    "layers", "conv", "conv_bn", "noise_images", "boundary_samples", "adam", "train", "eval", 10**5, "digits",
    "cifar10", "mnist_8",
]  # fmt: skip
KEYS = [
    "data", "teacher", "student", "protocol", "method", "compare", "seeds", "epochs", "steps", "evaluations",
    "compute", "route", "baseline", "title", "include", "target", "name", "weights", "model", "hooks", "stages",
    "losses", "optimizer", "schedule", "lr", "weight", "layer_weights", "hook", "connector", "trains", "share",
    "temperature", "start", "per_class", "fraction", "validation", "only_classes", "split_seed", "root", "x", "é",
    "a.b", "method.temperature", "keep", "classes", "compare.method", "augmentation", "normalization", "mean",
    "anchors", "source", "begins", "modes", "batch_norm", "weight_schedule", "label", "1", ".", "..",
    "stages.classification", "teacher.name", "method.name", "student.name", "protocol.name", "data.name",
    "compute.mode", "batch_size",
]  # fmt: skip


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def changed(data: Any, draw: random.Random, values: Callable[[], Any]) -> None:
    """Change plain data at one place: a key more, one less, another value, another name, a value as a list."""
    paths, how = [path for path in walk(data) if path], draw.random()
    if not paths or how < 0.25:
        mappings = [path for path in walk(data) if isinstance(at(data, path), dict)]
        if mappings:
            at(data, draw.choice(mappings))[draw.choice(KEYS)] = values()
        return
    path = draw.choice(paths)
    parent, key = at(data, path[:-1]), path[-1]
    if how < 0.4:
        del parent[key]
    elif how < 0.8:
        new = values()
        # Half of them of the same type, which gets further.
        for _ in range(50 if draw.random() < 0.5 else 0):
            new = new if type(new) is type(parent[key]) else values()
        parent[key] = new
    elif how < 0.9 and isinstance(parent, dict):
        parent[draw.choice(KEYS)] = parent.pop(key)
    else:
        parent[key] = [parent[key]] * draw.choice((1, 2, 3))


class Found:
    """What came of the inputs, and those that are faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outcomes, self.faults = folder, Counter[str](), dict[str, str]()

    def run(self, action: Callable[[], None], text: Callable[[], str]) -> None:
        """Try one input. `text`: what to keep of it."""
        from kdbench.errors import CellError, UserError

        def late(*_: Any) -> None:
            raise TimeoutError

        signal.signal(signal.SIGALRM, late)
        signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        signal.setitimer(signal.ITIMER_REAL, LATEST)
        try:
            action()
            outcome = "works"
        except UserError as error:
            outcome = "an error of the user"
            if not str(error).strip() or len(str(error)) > 4000:
                outcome = "no message, or a very long one"
        except (CellError, SystemExit):
            outcome = "an error"
        except OSError as error:
            # As the command says it: a path that cannot be.
            outcome = f"OSError {error.errno}" if error.errno is not None else f"{type(error).__name__} {error}"
        except BaseException as error:  # noqa: BLE001 - any other is what is looked for
            last = [f for f in traceback.extract_tb(error.__traceback__) if "kdbench" in f.filename][-1:]
            place = f"{Path(last[0].filename).name}:{last[0].lineno}" if last else "?"
            outcome = f"TRACEBACK {type(error).__name__} at {place}: {str(error)[:150]}"
            self._keep(outcome, traceback.format_exc() + "\n" + text())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if outcome.startswith(("TimeoutError", "OSError 4", "no message")):
            self._keep(outcome, text())
        self.outcomes[outcome] += 1

    def _keep(self, outcome: str, text: str) -> None:
        key = outcome.partition(": ")[0]
        if key not in self.faults:
            self.faults[key] = outcome
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{len(self.faults)}.txt").write_text(text, encoding="utf-8", errors="replace")


def recipes(count: int, seed: int, found: Found) -> None:
    """Plan changed recipes, and build the first cell of those that can be planned."""
    from kdbench.recipe.planning import plan
    from kdbench.registry import Registry

    draw, registry = random.Random(seed), Registry()
    known = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "recipes").rglob("*.yaml"))]
    known = [one for one in known if isinstance(one, dict)]

    def value() -> Any:
        if draw.random() < 0.8:
            return copy.deepcopy(draw.choice(ODD))
        data = draw.choice(known)
        return copy.deepcopy(at(data, draw.choice([*walk(data)])))

    folder = Path(tempfile.mkdtemp(prefix="kdbench-fuzz-"))
    for number in range(count):
        data = copy.deepcopy(draw.choice(known))
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 5))):
            changed(data, draw, value)
        text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
        if draw.random() < 0.06 and text:
            place = draw.randrange(len(text))
            text = (
                text[:place]
                + draw.choice(["\t", ":", "[", "{", "&a ", "*a ", "'", "%", "@", "!!x "])
                + text[place + 1 :]
            )
        file = folder / f"r{number % 10}.yaml"
        file.write_text(text, encoding="utf-8", errors="surrogateescape")

        def action(file: Path = file, build: bool = draw.random() < 0.7) -> None:
            planned = plan(str(file), registry)
            json.dumps(planned.recipe, default=str)
            assert all(len(cell.slug.encode()) < 240 for cell in planned.cells)
            if build:
                from kdbench.engine.checks.cells import check_cell

                check_cell(planned.cells[0].spec)

        found.run(action, lambda text=text: text)  # type: ignore[misc]
    shutil.rmtree(folder)


def folders(count: int, seed: int, found: Found, finished: Path) -> None:
    """Change a file of a finished run, then ask for its table and verify it."""
    from kdbench.cli import app

    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="kdbench-fuzz-"))
    names = sorted(file.relative_to(finished) for file in finished.rglob("*") if file.is_file())
    likely = [name for name in names if name.suffix in (".json", ".jsonl", ".yaml", ".csv", ".safetensors", ".npy", "")]
    for number in range(count):
        place = folder / f"{number % 4}" / finished.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(finished, place)
        log = [damage(place / draw.choice(likely), draw) for _ in range(draw.choice((1, 1, 2)))]
        words = draw.choice(
            (["table", str(place)], ["table", str(place), "--out", f"{place}/out"], ["verify", str(place)])
        )

        def action(words: list[str] = words) -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                app(words, standalone_mode=False)

        found.run(action, lambda words=words, log=log: f"{words}\n{log}")  # type: ignore[misc]
    shutil.rmtree(folder)


def damage(file: Path, draw: random.Random) -> str:
    """Change one file, or what stands in its place. Returns what was done."""
    if not file.is_file():
        return f"{file.name}: gone already"
    content, how, data = file.read_bytes(), draw.random(), None
    with contextlib.suppress(ValueError):
        # None where it was damaged before.
        data = json.loads(content) if how < 0.45 and file.suffix == ".json" else None
    if data is not None:
        changed(data, draw, lambda: copy.deepcopy(draw.choice(ODD)))
        file.write_text(json.dumps(data, default=str), encoding="utf-8", errors="surrogatepass")
        return f"{file}: {file.read_text(encoding='utf-8', errors='replace')[:20000]}"
    if how < 0.6:
        file.write_bytes(content[: draw.randrange(len(content) + 1)])
        return f"{file}: cut short"
    if how < 0.8:
        changed_bytes = bytearray(content)
        for _ in range(draw.choice((1, 5, 50))):
            if changed_bytes:
                changed_bytes[draw.randrange(len(changed_bytes))] = draw.randrange(256)
        file.write_bytes(changed_bytes)
        return f"{file}: other bytes"
    if how < 0.9:
        odd = [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"NaN", b"\x00" * 64]
        file.write_bytes(draw.choice(odd))
        return f"{file}: {file.read_bytes()[:20]!r}"
    file.unlink()
    if how < 0.95:
        file.mkdir()
    elif how < 0.97:
        file.symlink_to("/nowhere")
    return f"{file}: gone, a folder, or a link to nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("recipes", "folders"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "continual_small", help="a finished run")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import resource

    # A network that no machine has the memory for must not take this one's.
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    found, before = Found(ROOT / "build" / "fuzz" / f"{given.what}-{given.seed}"), time.monotonic()
    if given.what == "recipes":
        recipes(given.count, given.seed, found)
    else:
        folders(given.count, given.seed, found, given.folder)
    for outcome, number in found.outcomes.most_common():
        print(f"{number:7} {outcome}")
    taken = f"in {time.monotonic() - before:.0f} s"
    print(f"{given.count} {given.what} of seed {given.seed} {taken}, {len(found.faults)} faults")
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
