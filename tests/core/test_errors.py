"""The error tree: exit codes, texts, pickling, and the docstring that draws it."""

import pickle
import re

import pytest

from ray_ckpt.core import errors
from ray_ckpt.core.errors import RayCkptError, UsageError

EXIT_CODES = {
    "RayCkptError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "StepNotFoundError": 2,
    "StepExistsError": 2,
    "ForeignFolderError": 2,
    "LeaseHeldError": 2,
    "PurgeRefusedError": 2,
    "StateDictError": 2,
    "TransitionError": 2,
    "IntegrityError": 1,
    "UnknownSchemaError": 1,
    "SaveError": 1,
    "NodeLostError": 1,
    "OutOfMemoryError": 3,
    "ThrottledError": 3,
    "ConflictError": 3,
    "StorageError": 3,
    "ObjectNotFoundError": 2,
    "ObjectExistsError": 2,
    "TransientError": 3,
    "StorageFullError": 3,
    "AuthorizationError": 4,
}
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, RayCkptError)
}
TREE_LINE = re.compile(r"^([│├└─ ]*)([A-Z]\w+Error)(?:\s+exit (\d))?", re.MULTILINE)


@pytest.mark.parametrize("error_type", CLASSES.values(), ids=CLASSES)
def test_an_error_survives_pickling_with_all_four_texts(error_type: type[RayCkptError]) -> None:
    error = error_type("it broke", "s3://bucket/run", "nothing was changed", "ray-ckpt ls")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_type
    assert (copy.what, copy.where, copy.safe, copy.do) == (
        "it broke",
        "s3://bucket/run",
        "nothing was changed",
        "ray-ckpt ls",
    )
    assert str(copy) == str(error)


def test_every_class_has_its_exit_code() -> None:
    assert {name: error_type.exit_code for name, error_type in CLASSES.items()} == EXIT_CODES


def test_the_text_has_one_labelled_line_for_each_fact() -> None:
    error = RayCkptError("step-5 is corrupt", "s3://b/run/step-5", "the rest is whole", "ray-ckpt")
    assert str(error) == (
        "step-5 is corrupt\n"
        "  where: s3://b/run/step-5\n"
        "  safe:  the rest is whole\n"
        "  do:    ray-ckpt"
    )


def test_a_fact_that_was_not_given_has_no_line() -> None:
    assert str(RayCkptError("it broke")) == "it broke"
    assert str(RayCkptError("it broke", do="ray-ckpt ls")) == "it broke\n  do:    ray-ckpt ls"


def test_a_mistake_of_the_user_is_a_value_error() -> None:
    value_errors = {name for name, value in CLASSES.items() if issubclass(value, ValueError)}
    assert value_errors == {n for n, value in CLASSES.items() if issubclass(value, UsageError)}


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    drawn: dict[str, str | None] = {}
    above: dict[int, str] = {}
    for bars, name, exit_code in TREE_LINE.findall(errors.__doc__ or ""):
        depth = len(bars)
        above[depth] = name
        drawn[name] = max(((d, n) for d, n in above.items() if d < depth), default=(0, None))[1]
        if exit_code:
            assert CLASSES[name].exit_code == int(exit_code)
        for deeper in [d for d in above if d > depth]:
            del above[deeper]
    parents = {name: value.__base__ for name, value in CLASSES.items()}
    assert drawn == {
        name: parent.__name__ if parent in CLASSES.values() else None
        for name, parent in parents.items()
    }
