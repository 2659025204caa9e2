"""A name at a destination leads to the copy that was meant, and to no other at any moment."""

from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import LeaseHeldError, ObjectExistsError, UsageError
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.promote import promote_copy
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.copies.retire import retire_copy
from tests.processes import run_python
from tests.servers.hub import HubDouble
from tests.storage.copies.test_publish import make_export, publish
from tests.storage.copies.test_retire import publish_of

KEY = "exports/hf/latest"


@pytest.fixture
def exports(catalog: Catalog, destination: str) -> list[ExportView]:
    """Of steps 5 and 7; both are at the destination."""
    made = [make_export(catalog, 5), make_export(catalog, 7, b"newer")]
    for export in made:
        publish_export(catalog, export, destination)
    return made


def nothing() -> None:
    """The guard of a manager that nobody has taken over from."""


def promote(export: ExportView, destination: str, *, content_id: str | None = None) -> str:
    wanted = content_id or export.manifest.content_id
    action = publish_of(export, destination)
    return promote_copy(action, "latest", content_id=wanted, guard=nothing)


def leads_to(destination: str) -> str | None:
    return open_catalog(destination).store.pointed(KEY)


def test_a_name_leads_to_the_promoted_copy_and_back_to_an_older_one(
    destination: str, exports: list[ExportView]
) -> None:
    old, new = exports
    for export in (old, new, new, old):
        assert promote(export, destination) == f"{destination}/{KEY}"
        assert leads_to(destination) == f"step-{export.step}"


def test_nothing_else_takes_the_name_for_a_step(
    catalog: Catalog, destination: str, exports: list[ExportView]
) -> None:
    old, new = exports
    promote(new, destination)
    target = open_catalog(destination)
    observer = target.observer()
    for now in (0.0, 1.0, 100.0):
        observed = observer.observe(now=now)
        assert [(e.name, e.step) for e in observed.exports] == [("hf", 5), ("hf", 7)]
        assert observed.checkpoints == ()
    assert publish_export(catalog, new, destination).bytes_sent == 0
    action = publish_of(old, destination)
    assert retire_copy(catalog.uri, action, content_id=old.manifest.content_id).bytes_freed > 0
    assert [e.step for e in target.observe().exports] == [7]
    assert leads_to(destination) == "step-7"


def test_what_is_gone_or_another_one_is_not_promoted(
    destination: str, exports: list[ExportView]
) -> None:
    old, new = exports
    promote(old, destination)
    with pytest.raises(UsageError, match="it is gone, or another one") as caught:
        promote(new, destination, content_id=old.manifest.content_id)
    assert "publish step-7 hf" in caught.value.do
    open_catalog(destination).store.delete([names.manifest_key("exports/hf/step-7")])
    with pytest.raises(UsageError, match="it is gone, or another one"):
        promote(new, destination)
    assert leads_to(destination) == "step-5"


def test_somebody_elses_file_of_that_name_stays(
    destination: str, exports: list[ExportView]
) -> None:
    store = open_catalog(destination).store
    store.write(KEY, b"my notes on these models")
    with pytest.raises(ObjectExistsError):
        promote(exports[0], destination)
    assert store.read(KEY) == b"my notes on these models"


def test_a_link_that_leads_elsewhere_stays(catalog: Catalog, tmp_path: Path) -> None:
    destination, export = str(tmp_path / "copies"), make_export(catalog, 5)
    publish_export(catalog, export, destination)
    open_catalog(destination).store.point(KEY, "../../mine")
    with pytest.raises(UsageError, match=r"latest leads to \.\./\.\./mine already"):
        promote(export, destination)
    assert leads_to(destination) == "../../mine"


def test_a_manager_that_was_taken_over_moves_no_name(
    destination: str, exports: list[ExportView]
) -> None:
    """Scenario 28: the stale one finds out right before it would act."""
    old, new = exports
    promote(old, destination)

    def taken_over() -> None:
        raise LeaseHeldError("epoch 2 has taken over from our epoch 1")

    action = publish_of(new, destination)
    with pytest.raises(LeaseHeldError):
        promote_copy(action, "latest", content_id=new.manifest.content_id, guard=taken_over)
    assert leads_to(destination) == "step-5"


# ---- the Hub ----

PROMOTE = """
import sys
from ray_ckpt.core.actions import Action
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.storage.copies.promote import promote_copy
to, step, content_id, tag = sys.argv[1:]
publish = Action(
    kind=ActionKind.PUBLISH, step=int(step), source_id="s",
    export=ExportSpec(name="hf"), destination=to,
)
try:
    print("done", promote_copy(publish, tag, content_id=content_id, guard=lambda: None))
except RayCkptError as error:
    print("failed", type(error).__name__, error)
"""


@pytest.fixture
def on_hub(catalog: Catalog, root: str, hub: HubDouble) -> ExportView:
    """Of step 5, which is published, and then another commit on the branch."""
    export = make_export(catalog, 5)
    hub.api().create_repo("ray/model")
    publish(root, hub, "hf://ray/model")
    hub.api().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ray/model")
    return export


def promote_to_tag(hub: HubDouble, export: ExportView, tag: str, content_id: str = "") -> str:
    """In a process of its own, whose Hub is the double; its output or error."""
    wanted = content_id or export.manifest.content_id
    arguments = ("-c", PROMOTE, "hf://ray/model", str(export.step), wanted, tag)
    return run_python(*arguments, environment=hub.environment()).stdout.strip()


def tags(hub: HubDouble) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in hub.api().list_repo_refs("ray/model").tags}


def test_a_tag_of_that_name_is_moved_to_the_steps_commit(
    hub: HubDouble, on_hub: ExportView
) -> None:
    hub.api().create_tag("ray/model", tag="latest", revision="main")
    assert tags(hub)["latest"] != tags(hub)["step-5"]
    assert promote_to_tag(hub, on_hub, "latest") == "done hf://ray/model@latest"
    assert tags(hub)["latest"] == tags(hub)["step-5"]
    before = len([line for line in hub.requests if "/tag/" in line])
    assert promote_to_tag(hub, on_hub, "latest") == "done hf://ray/model@latest"
    assert len([line for line in hub.requests if "/tag/" in line]) == before, "it is there"


@pytest.mark.parametrize(
    ("request_line", "is_carried_out"),
    [("DELETE .*/tag/", True), ("POST .*/tag/", False), ("POST .*/tag/", True)],
)
def test_a_tag_that_was_lost_on_its_way_is_there_after_another_try(
    hub: HubDouble, on_hub: ExportView, request_line: str, is_carried_out: bool
) -> None:
    """Scenario 36, for a tag: the answer is lost, or the process dies between its two steps."""
    hub.api().create_tag("ray/model", tag="latest", revision="main")
    hub.fail(match=request_line, status=500, after=is_carried_out)
    assert promote_to_tag(hub, on_hub, "latest").startswith("failed TransientError")
    assert promote_to_tag(hub, on_hub, "latest").startswith("done")
    assert tags(hub)["latest"] == tags(hub)["step-5"]


def test_what_the_hub_does_not_hold_is_not_promoted(hub: HubDouble, on_hub: ExportView) -> None:
    gone = ExportView(name="hf", step=6, manifest=on_hub.manifest)
    assert "its tag is gone, or on something else" in promote_to_tag(hub, gone, "latest")
    assert "its tag is gone, or on something else" in promote_to_tag(
        hub, on_hub, "latest", content_id="another"
    )
    assert "a branch is called main" in promote_to_tag(hub, on_hub, "main")
    assert set(tags(hub)) == {"step-5"}
