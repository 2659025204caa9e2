"""What was looked at and how it is, as a person is told: pure data."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much it matters."""

    OK = "ok"
    WARNING = "warning"
    """It costs something, or will one day; everything works."""
    PROBLEM = "problem"
    """Something will fail, or can be lost, unless somebody changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    where: str
    do: str = ""
    """What to change, or to type; empty where nothing is to be done."""

    def __str__(self) -> str:
        cure = f". {self.do}" if self.do else ""
        return f"{self.where}: {self.what}{cure}"


def ok(what: str, where: str) -> Finding:
    """All is well there."""
    return Finding(level=Level.OK, what=what, where=where)


def warning(what: str, where: str, do: str) -> Finding:
    """It works, at a price."""
    return Finding(level=Level.WARNING, what=what, where=where, do=do)


def problem(what: str, where: str, do: str) -> Finding:
    """It will not go well."""
    return Finding(level=Level.PROBLEM, what=what, where=where, do=do)


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether one of them is a problem."""
    return any(finding.level is Level.PROBLEM for finding in findings)
