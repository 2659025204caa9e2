"""The smoke test for the real Hub works: here the Hub is the double."""

import pytest

from tests.processes import run_python
from tests.servers.hub import HubDouble, Way

BUCKET = ("--bucket", "ray/kept")


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


def smoke(hub: HubDouble, *options: str) -> tuple[int, str]:
    arguments = ("-m", "tests.smoke_hub", "ray/smoke", *options)
    done = run_python(*arguments, environment=hub.environment(), check=False)
    return done.returncode, done.stdout + done.stderr


def test_all_is_well_and_nothing_is_left(hub: HubDouble) -> None:
    code, said = smoke(hub, *BUCKET, "--delete")
    assert code == 0, said
    for text in ("published again: 0 bytes are sent", "storage of step-10 is free", "all is well"):
        assert text in said
    assert not hub.api().repo_exists("ray/smoke")
    assert list(hub.api().list_buckets("ray")) == []


def test_what_is_not_as_it_should_be_ends_it_and_is_deleted_all_the_same(hub: HubDouble) -> None:
    hub.fail(match="POST .*/lfs-files/batch", status=200, body=b"{}", times=10)
    code, said = smoke(hub, "--delete")
    assert code == 1
    assert "not so: the storage of step-10 is free" in said
    assert not hub.api().repo_exists("ray/smoke")


def test_a_repository_that_is_there_is_not_touched(hub: HubDouble) -> None:
    hub.api().create_repo("ray/smoke")
    code, said = smoke(hub, "--delete")
    assert code == 1
    assert "409" in said
    assert hub.api().list_repo_files("ray/smoke") == [".gitattributes"]
