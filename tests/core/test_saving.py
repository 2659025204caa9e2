"""What a training loop may be told about saving, and what is refused."""

import dataclasses

import pytest

from ray_ckpt.core.config import build
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.saving import Everything, HuggingFace, ModelOnly, SaveConfig


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"kind": "everything"}, Everything()),
        ({"kind": "model"}, ModelOnly()),
        ({"kind": "model", "dtype": "bfloat16"}, ModelOnly(dtype="bfloat16")),
        ({"kind": "hf", "name": "final"}, HuggingFace(name="final")),
    ],
)
def test_the_kind_says_what_the_last_save_holds(last: dict[str, str], expected: object) -> None:
    assert build(SaveConfig, {"last": last}, where="job.toml").last == expected


@pytest.mark.parametrize(
    "last", [Everything(), ModelOnly(dtype="float16"), HuggingFace(name="a", dtype="float32")]
)
def test_a_config_survives_being_written_as_plain_values(last: ModelOnly | HuggingFace) -> None:
    config = SaveConfig(every_steps=None, every_s=60.0, sigterm_notice_s=30.0, last=last)
    assert build(SaveConfig, dataclasses.asdict(config), where="worker") == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"every_steps": 0}, "every_steps must be at least 1, got 0"),
        ({"full_every_saves": 0}, "full_every_saves must be at least 1, got 0"),
        (
            {"full_every_saves": 2, "local_dir": "/disk"},
            "full_every_saves must be 1 with local_dir",
        ),
        ({"every_s": 0}, "every_s must be more than 0 seconds, got 0"),
        ({"every_s": float("nan")}, "expected float, got nan"),
        ({"sigterm_notice_s": -1}, "sigterm_notice_s must be more than 0 seconds"),
        ({"timeout_s": 0}, "timeout_s must be more than 0 seconds"),
        ({"local_dir": "disk"}, "local_dir must be an absolute path, got 'disk'"),
        ({"last": {"kind": "huggingface"}}, "'everything', 'model', 'hf'"),
        ({"last": {"dtype": "float32"}}, "kind is None, none of"),
        ({"last": {"kind": "everything", "dtype": "float32"}}, "unknown key 'dtype'"),
        ({"last": {"kind": "hf", "name": "../up"}}, "cannot be part of a folder name"),
        ({"mode": "process2"}, "'process2' is none of 'sync', 'async', 'process'"),
        ({"when_busy": "queue"}, "'queue' is none of 'skip', 'wait'"),
        ({"on_failure": True}, "True is none of 'continue', 'stop'"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_value(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(SaveConfig, values, where="job.toml")
    assert words in str(caught.value)
