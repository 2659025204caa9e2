"""Who joins the still file, who leaves it, and when it is written anew."""

from collections.abc import Iterable, Mapping

from torch.distributed.checkpoint.metadata import MetadataIndex

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.commit import Kept
from ray_ckpt.tensors.still import LEAST_BYTES, NOTHING, Knowledge, Seen, StillFile

NUM_BYTES = LEAST_BYTES
EVER = 1000


def save(
    known: Knowledge, values: Mapping[str, object], every: int = EVER
) -> tuple[str, Knowledge]:
    """What one save does with tensors of these values, and what it knows then.

    Capitals are the still file's, brackets say that it is written; `|a` were looked at.
    """
    digests = {MetadataIndex(name): repr(value) for name, value in values.items()}
    expected = known.expected()
    looked = {index: digest for index, digest in digests.items() if index in expected}
    division = known.divide(looked, full_every_saves=every)
    still = _text(division.still).upper()
    done = f"{still if division.file else f'[{still}]'}|{_text(looked)}"
    found = {i: Seen(digest=d, num_bytes=NUM_BYTES, is_sound=True) for i, d in digests.items()}
    file = None
    if division.still:
        entry = FileEntry(path="f", size_bytes=1, digest="crc64nvme:0")
        file = StillFile(
            kept=Kept(folder="step-1", entry=entry, mark=None),
            places=dict.fromkeys(division.still, (0, 1)),
            num_steps=1 + (division.file.num_steps if division.file else 0),
        )
    return done, Knowledge(seen=known.after(found, expected=expected), file=file)


def _text(indexes: Iterable[MetadataIndex]) -> str:
    return "".join(sorted(index.fqn for index in indexes))


def saves(*steps: Mapping[str, object], every: int = EVER) -> list[str]:
    known, done = NOTHING, list[str]()
    for values in steps:
        text, known = save(known, values, every)
        done.append(text)
    return done


def test_what_stands_still_is_written_apart_and_then_no_more() -> None:
    steps = [{"a": 0, "b": step} for step in range(5)]
    assert saves(*steps) == ["[]|", "[A]|ab", "A|a", "A|a", "A|a"]


def test_a_state_that_always_moves_is_looked_at_once() -> None:
    assert saves(*({"a": step} for step in range(5))) == ["[]|", "[]|a", "[]|", "[]|", "[]|"]


def test_who_moves_leaves_and_the_rest_is_written_anew() -> None:
    steps = [{"a": 0, "b": 0}] * 3 + [{"a": 0, "b": 1}] * 2
    assert saves(*steps) == ["[]|", "[AB]|ab", "AB|ab", "[A]|ab", "A|a"]


def test_who_moves_to_and_fro_costs_less_and_less() -> None:
    """After two moves nobody expects it to stay."""
    steps = [{"a": 0, "b": step // 4} for step in range(64)]
    written = [at for at, done in enumerate(saves(*steps)) if done.startswith("[A")]
    assert written == [1, 4, 6, 8]


def test_few_wait_until_they_are_many_enough_to_write_all_others_again() -> None:
    """One of five is less than a quarter of the rest."""
    five = dict.fromkeys("abcde", 0)
    steps = [{**five, "f": 0}, {**five, "f": 1}] + [{**five, "f": 2}] * 4
    assert saves(*steps) == [
        "[]|", "[ABCDE]|abcdef", "ABCDE|abcde", "ABCDE|abcde", "ABCDE|abcdef", "ABCDE|abcdef"
    ]  # fmt: skip
    two = [{**step, "g": step["f"]} for step in steps]
    assert saves(*two)[-2:] == ["[ABCDEFG]|abcdefg", "ABCDEFG|abcdefg"]


def test_so_many_steps_share_a_file_and_no_more() -> None:
    done = saves(*([{"a": 0}] * 8), every=3)
    assert done == ["[]|", "[A]|a", "A|a", "A|a", "[A]|a", "A|a", "A|a", "[A]|a"]


def test_little_is_no_file_of_its_own() -> None:
    seen = {
        MetadataIndex(name): Seen(digest="0", num_bytes=LEAST_BYTES // 2, is_sound=True)
        for name in "ab"
    }
    known = Knowledge(seen=seen)
    one = {MetadataIndex("a"): "0"}
    assert not known.divide(one, full_every_saves=EVER).still
    assert known.divide({**one, MetadataIndex("b"): "0"}, full_every_saves=EVER).still


def test_another_kind_of_tensor_of_the_same_name_is_another_one() -> None:
    assert saves({"a": 0}, {"a": 0}, {"a": "0"}, {"b": 0})[2:] == ["[]|a", "[]|"]
