"""Every name that is written can be read back, and nothing else is taken for one."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core import names

STEPS = st.integers(min_value=0, max_value=10**18)
WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(names.is_word)
SAVE_IDS = st.from_regex(r"[0-9a-zA-Z]{1,32}", fullmatch=True)


@given(step=STEPS)
@settings(max_examples=100, deadline=None)
def test_parsing_undoes_formatting_for_every_step(step: int) -> None:
    assert names.parse_step(names.step_dir(step)) == step


@given(text=st.text(alphabet="step-0123456789. \u0663xT\n", max_size=12))
@settings(max_examples=100, deadline=None)
def test_only_what_formatting_writes_is_a_step(text: str) -> None:
    step = names.parse_step(text)
    assert step is None or names.step_dir(step) == text


@pytest.mark.parametrize(
    "leftover",
    [
        "step-0500",
        "step-5.tmp",
        "xstep-5",
        "step-",
        "step--5",
        "step-5 ",
        "step-5\n",
        "step-\u0665",
        "Step-5",
        "step_5",
        "step-5/",
        "step-1e3",
        "",
    ],
)
def test_a_leftover_is_no_step(leftover: str) -> None:
    assert names.parse_step(leftover) is None


@given(step=STEPS, name=WORDS)
@settings(max_examples=100, deadline=None)
def test_a_pin_of_any_allowed_name_is_found_again(step: int, name: str) -> None:
    folder, _, file_name = names.pin_key(step, name).rpartition("/")
    assert folder == names.step_dir(step)
    assert names.parse_pin(file_name) == name


@pytest.mark.parametrize(
    "file_name",
    [names.MANIFEST, "ray_ckpt.pin..json", "ray_ckpt.pin.a.json.tmp", "pin.a.json", "__0_0.distcp"],
)
def test_another_file_is_no_pin(file_name: str) -> None:
    assert names.parse_pin(file_name) is None


@given(step=STEPS, save_id=SAVE_IDS)
@settings(max_examples=50, deadline=None)
def test_a_folder_set_aside_names_its_step_and_save(step: int, save_id: str) -> None:
    folder = names.set_aside_dir(names.TRASH, step, save_id)
    assert names.parse_set_aside(folder.removeprefix(f"{names.TRASH}/")) == (step, save_id)


@pytest.mark.parametrize(
    "name", ["step-5", "step-5.", "step-05.a", "step-5.a.b", "5.a", "step-5.a/"]
)
def test_another_folder_was_not_set_aside(name: str) -> None:
    assert names.parse_set_aside(name) is None


@given(role=st.from_regex(r"[a-z]+(-[a-z]+)*", fullmatch=True), epoch=STEPS)
@settings(max_examples=50, deadline=None)
def test_a_lease_file_names_its_role_and_epoch(role: str, epoch: int) -> None:
    file_name = names.lease_key(role, epoch).removeprefix(f"{names.LEASES}/")
    assert names.parse_lease(file_name) == (role, epoch)


@pytest.mark.parametrize("file_name", ["trainer-7", "trainer.json", "-7.json", "trainer-x.json"])
def test_another_file_is_no_lease(file_name: str) -> None:
    assert names.parse_lease(file_name) is None


@pytest.mark.parametrize("name", ["hf-bf16", "v1.0", "a", "A_b", "0"])
def test_a_word_may_be_part_of_a_key(name: str) -> None:
    assert names.is_word(name)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "step-5", "a b", "a*", "ä", "x" * 65])
def test_what_could_leave_or_hide_in_a_folder_is_no_word(name: str) -> None:
    assert not names.is_word(name)


def test_two_roots_with_one_last_part_have_two_names() -> None:
    assert names.run_name("s3://bucket/llama-8b") == "llama-8b-873547"
    assert names.run_name("s3://bucket/llama-8b/") == names.run_name("s3://bucket/llama-8b")
    assert names.run_name("s3://other/llama-8b") != names.run_name("s3://bucket/llama-8b")
    assert names.manager_name("s3://bucket/llama-8b") == "ray_ckpt:llama-8b-873547"


@pytest.mark.parametrize(
    "key",
    [
        names.staging_dir("save-1"),
        names.begun_key("step-5"),
        names.action_key("ab"),
        names.request_key("ab"),
        names.lease_key("trainer", 1),
        names.set_aside_dir(names.QUARANTINE, 5, "a1"),
        names.RUN,
    ],
)
def test_everything_that_is_not_a_checkpoint_lies_in_the_private_folder(key: str) -> None:
    assert key.startswith(f"{names.PRIVATE}/")


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(names) == doctest.TestResults(failed=0, attempted=9)
