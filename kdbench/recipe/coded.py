"""What cells' specs are made of: plain data, and code under a name that stays when it moves."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kdbench.names import content_name

# Fields of specs that hold targets, or mappings of names to targets.
CODE = ("target", "metrics", "references", "layout")
# The context in which a spec is written for a record.
RECORDED = "record"


class Spec(BaseModel):
    """Resolved plain data."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Coded(BaseModel):
    """What names code. In a record and in an identity, code counts under a name that stays when it moves."""

    counts_as: dict[str, str] = Field(default={}, description="target -> what is hashed in its place, where it differs")

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        if info.context == RECORDED:
            plain |= {part: renamed(plain[part], self.counts_as) for part in CODE if part in plain}
            del plain["counts_as"]
            # As in records of before there were versions.
            if plain.get("version") == 1:
                del plain["version"]
        return plain


class TargetSpec(Coded, Spec):
    """A registered thing with its options: what to call, and with what."""

    name: str
    target: str = Field(description="module:object, in this process; a record holds what it counts as in its place")
    options: dict[str, Any] = {}
    source_sha256: str | None = Field(
        default=None, description="of the target's file and those that it imports, where they are the user's own code"
    )
    version: int = Field(default=1, description="of the card")

    @model_validator(mode="before")
    @classmethod
    def own_code_by_its_content(cls, data: Any) -> Any:
        """Records of earlier versions name the module of a user's own code."""
        if isinstance(data, dict) and "counts_as" not in data:
            target, sha256 = data.get("target"), data.get("source_sha256")
            if isinstance(target, str) and ":" in target and isinstance(sha256, str):
                return {**data, "counts_as": {target: content_name(target, sha256)}}
        return data


def renamed(code: Any, names: dict[str, str]) -> Any:
    if isinstance(code, dict):
        return {key: names.get(target, target) for key, target in code.items()}
    return names.get(code, code)
