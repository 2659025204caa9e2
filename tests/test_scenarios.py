"""SCENARIOS.md says of each thing that can go wrong which tests show what happens then."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = re.compile(r"[Ss]cenarios? (\d+)((?:(?:,| and|, and| to) \d+)*)")
MORE = re.compile(r"(,| and|, and| to) (\d+)")
ROW = re.compile(r"\| (\d+) \| .* \| (.*) \|")


def numbers_in(text: str) -> set[int]:
    """Every scenario that a docstring names, one by one or as a range."""
    found: set[int] = set()
    for first, rest in NAMED.findall(text):
        last = int(first)
        found.add(last)
        for word, number in MORE.findall(rest):
            found |= set(range(last if word == " to" else int(number), int(number) + 1))
            last = int(number)
    return found


def named_by(path: Path) -> set[int]:
    """What the docstrings of one test file name."""
    kinds = ast.Module, ast.FunctionDef
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))
    return set().union(*(numbers_in(ast.get_docstring(node) or "") for node in nodes))


def shown_in_tests() -> dict[int, set[str]]:
    """Scenario to the files that show it."""
    shown: dict[int, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for number in named_by(path):
            shown.setdefault(number, set()).add(path.relative_to(TESTS).as_posix())
    return shown


def rows() -> Iterator[tuple[int, set[str]]]:
    for number, files in ROW.findall((TESTS / "SCENARIOS.md").read_text()):
        yield int(number), set(re.findall(r"`([^`]+)`", files))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Scenarios 1, 2 and 6, with SIGKILL", {1, 2, 6}),
        ("Scenarios 18 to 21: a flipped bit", {18, 19, 20, 21}),
        ("It stays (scenario 50). 3 more", {50}),
        ("No number", set[int]()),
    ],
)
def test_a_docstring_names_scenarios_one_by_one_or_as_a_range(text: str, numbers: set[int]) -> None:
    assert numbers_in(text) == numbers


def test_every_scenario_has_a_row_with_the_tests_that_name_it() -> None:
    listed = list(rows())
    assert [number for number, _ in listed] == list(range(1, 57))
    shown = shown_in_tests()
    assert {n: (files, shown.get(n)) for n, files in listed if files != shown.get(n, set())} == {}
