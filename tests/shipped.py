"""The shipped cards, read once for all tests of a process: no test adds one. And a small recipe that lacks a method."""

from __future__ import annotations

from typing import Any

from kdbench.registry import Registry

REGISTRY = Registry()
DIGITS: dict[str, Any] = {"data": "digits", "teacher": "wrn_16_2_digits", "student": "wrn_10_1", "protocol": "digits"}
