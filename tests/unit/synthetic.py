"""Synthetic records of finished cells, as the engine writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kdbench.record import Record, read_records


def plain_record(method: str = "kd", seed: int = 0, last: float = 90.0, **over: Any) -> dict[str, Any]:
    """A record as plain data. `over`: label, axes, order, student, teacher, …; a dotted path ("compute.precision") sets
    any entry, with two underscores for a dot."""
    names = {
        "label": method.upper(),
        "student": "wrn_16_2",
        "teacher": "wrn_22_4_cifar10",
        "data": "cifar10",
        "protocol": "ab_official",
        "axes": {"method": method},
        "order": 0,
        "baseline": "ce",
        "recipe": "synthetic",
        "best": min(100.0, last + 0.2),
        "agreement": {},
        "extra_epochs": 0.0,
        "epochs": 200.0,
    }
    names |= {key: over.pop(key) for key in list(over) if key in names}
    epochs = names["epochs"] + names["extra_epochs"]
    teacher = names["teacher"]
    record: dict[str, Any] = {
        "schema": 1,
        "kdbench": "0.1.0",
        "status": "finished",
        "identity": "",
        "recipe": names["recipe"],
        "cell": {
            "method": method,
            **{
                key: names[key]
                for key in ("label", "student", "teacher", "data", "protocol", "axes", "order", "baseline")
            },
            "seed": seed,
        },
        "spec": {"seed": seed, "data": {"name": names["data"]}, "method": {"name": method, "label": names["label"]}},
        "budget": {
            "steps": int(391 * epochs),
            "epochs": epochs,
            "extra_epochs": names["extra_epochs"],
            "stages": [{"name": "classification", "steps": int(391 * epochs)}],
        },
        "result": {
            "test": {"last": round(last, 4), "best": round(names["best"], 4), "best_step": 77000},
            "validation": None,
            "metrics": {"agreement": names["agreement"]} if names["agreement"] else {},
        },
        "teacher": teacher and {"name": teacher, "sha256": "ab" * 32, "accuracy": 95.5},
        "data": {
            "name": names["data"],
            "fingerprint": "cd" * 32,
            "train": 50000,
            "validation": 0,
            "test": 10000,
            "classes": 10,
            "origin": "official archive",
        },
        "models": {"student": {"parameters": 691674, "flops": 2.0e8}, "teacher": None},
        "compute": {
            "device": "cpu",
            "device_name": "Model 7 Processor",
            "threads": 1,
            "precision": "float32",
            "layout": "contiguous",
            "compile": False,
            "cuda_graphs": False,
            "teacher_logits": "computed",
            "evaluation": "float32, eager",
            "seconds": 130.0,
            "training_seconds": 120.0 + seed,
            "images_per_second": 5100.0,
            "python": "3.12.1",
            "torch": "2.11.0",
            "torchvision": "0.26.0",
            "platform": "Linux",
            "cpu_capability": "AVX2",
        },
        "seeds": {"seed": seed, "split": seed, "streams": ["init", "connectors", "order", "augmentation", "dropout"]},
        "git": {"commit": "0123456789abcdef", "dirty": False},
    }
    for path, value in over.items():
        inner = record
        *parents, leaf = path.split("__")
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    content = json.dumps([record["cell"], record["spec"], record["budget"]], sort_keys=True)
    record["identity"] = record["identity"] or hashlib.sha256(content.encode()).hexdigest()
    return record


def make(method: str = "kd", seed: int = 0, last: float = 90.0, **over: Any) -> Record:
    """The same as a typed record."""
    return Record.model_validate(plain_record(method, seed, last, **over))


def comparison(values: dict[str, list[float]], **over: Any) -> list[Record]:
    """Records of several methods: method -> accuracies of seeds 0, 1, …, in the order of the mapping."""
    return [
        make(method, seed, last, order=order, **({"teacher": None} if method == "ce" else {}) | over)
        for order, (method, several) in enumerate(values.items())
        for seed, last in enumerate(several)
    ]


def write(folder: Path, record: dict[str, Any], metrics: list[dict[str, Any]] | None = None) -> Path:
    """A cell's folder with its record and metrics."""
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    return folder


def finished(folder: Path, values: dict[str, list[float]], **over: Any) -> list[Record]:
    """A comparison's records in folders of their own, with nine evaluations each."""
    for record in comparison(values, agreement={"layer1.preact": 0.8}, **over):
        metrics = [
            {
                "step": step,
                "epoch": step / 100,
                "test": {"accuracy": 50 + step / 20},
                "metrics": {"agreement": {"layer1.preact": 0.7}},
            }
            for step in range(0, 900, 100)
        ]
        write(folder / f"{record.cell.method}-{record.cell.seed}", record.plain(), metrics)
    return read_records([folder])
