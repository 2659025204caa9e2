"""`ray-ckpt export` in other forms, and of a step that only a person should export."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Answer
from tests.roots import make_root, snapshot

Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("forms") / "run")
    make_root(root, (10,))
    return root


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        (("lora",), "write --as lora=peft"),
        (("lora=",), "write --as lora=peft"),
        (("lora=peft", "lora=merged"), "one CONVERTER=FLAVOR a converter"),
        (("lora=peft",), "lora, which did not change this model"),
    ],
)
def test_a_form_that_cannot_be_is_refused(
    cli: Cli, root: str, forms: tuple[str, ...], says: str
) -> None:
    options = [word for form in forms for word in ("--as", form)]
    answer = cli("export", root, "--step", 10, *options)
    assert answer.code == 2
    assert says in answer.err
    assert not (Path(root) / "exports").exists()


def test_a_step_that_is_finite_is_exported_the_same_if_others_were_allowed(
    cli: Cli, root: str
) -> None:
    assert cli("export", root, "--step", 10).code == 0
    before = snapshot(f"{root}/exports")
    assert cli("export", root, "--step", 10, "--allow-non-finite").code == 0
    assert snapshot(f"{root}/exports") == before
