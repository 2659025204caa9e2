"""Whatever a client says, no key and no token of it is seen."""

import pytest

from ray_ckpt.storage.secrets import HIDDEN, without_secrets

TOKEN = "hf_" + "aB3" * 10
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (f"401 for token {TOKEN}.", f"401 for token {HIDDEN}."),
        (f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {HIDDEN}"),
        ("'Authorization': 'Basic dXNlcjpwYXNz'", f"'Authorization': 'Basic {HIDDEN}'"),
        (
            "PUT https://s3/x?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=ab12&partNumber=1 failed",
            f"PUT https://s3/x?X-Amz-Credential={HIDDEN}&X-Amz-Signature={HIDDEN}&partNumber=1"
            " failed",
        ),
        (f"{{'aws_secret_access_key': '{SECRET}'}}", f"{{'aws_secret_access_key': '{HIDDEN}'}}"),
        ("https://me:pass@host/x", f"https://{HIDDEN}@host/x"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, seen: str) -> None:
    assert without_secrets(text) == seen


def test_the_values_of_the_environment_are_hidden_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "s3")
    assert without_secrets(f"<{SECRET}> at s3://bucket") == f"<{HIDDEN}> at s3://bucket"


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer.json is no tokenizer: KeyError('model')",
        "s3://bucket/run/step-5: the store says no: 403 AccessDenied",
        "https://huggingface.co/org/repo/resolve/main/config.json",
        "hf_assets/config.json differs",
        "a basic misunderstanding",
        "sha256:0b721e882a43b535f50a245f09ebc42b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text
