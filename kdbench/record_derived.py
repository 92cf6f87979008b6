"""What of a record follows from the resolved recipe in it, and is not written a second time."""

from typing import Any

from pydantic import ValidationError

from kdbench.recipe.model_specs import DataSpec
from kdbench.recipe.specs import CellSpec
from kdbench.recipe.timeline import planned_timeline, training_images, validation_images


def derived(spec: CellSpec) -> dict[str, Any]:
    """What of a record follows from its resolved recipe, in the form of the record: names, counts, budget, seeds."""
    line = planned_timeline(spec)
    split = spec.data.split_seed

    def images(data: DataSpec) -> dict[str, Any]:
        tested = data.test if data.tested_on == "test" else validation_images(data)
        return {"name": data.name, "test": tested, "classes": data.classes}

    return {
        "cell": {
            "method": spec.method.name,
            "label": spec.method.label,
            "student": spec.student.name,
            "teacher": spec.teacher and spec.teacher.name,
            "data": spec.data.name,
            "target": spec.target and spec.target.name,
            "protocol": spec.protocol.name,
            "seed": spec.seed,
        },
        "budget": {
            "steps": line.total,
            "epochs": round(line.epochs(line.total), 4),
            "extra_epochs": round(line.epochs(line.extra), 4),
            "batches_per_epoch": line.batches_per_epoch,
            "stages": [{"name": span.name, "steps": span.steps} for span in line.spans],
        },
        "teacher": {"name": spec.teacher.name} if spec.teacher and not spec.teacher.untrained else None,
        "data": images(spec.data) | {"train": training_images(spec.data), "validation": validation_images(spec.data)},
        "target": spec.target and images(spec.target) | {"train": spec.target.train, "validation": 0},
        "seeds": {"seed": spec.seed, "split": spec.seed if split is None else split},
    }


def typed_spec(spec: Any) -> CellSpec | None:
    """A resolved recipe in the form of today; None where it has another."""
    try:
        return CellSpec.model_validate(spec)
    except ValidationError:
        return None


def filled(data: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Plain data with what it lacks of others."""
    found = more | data
    both = [key for key in more if isinstance(more[key], dict) and isinstance(data.get(key), dict)]
    return found | {key: filled(data[key], more[key]) for key in both}


def without(data: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Plain data without what others hold too."""
    found = {}
    for key, value in data.items():
        if isinstance(value, dict) and isinstance(more.get(key), dict):
            if rest := without(value, more[key]):
                found[key] = rest
        elif key not in more or value != more[key]:
            found[key] = value
    return found
