"""Old copies go from the Hub with their content, and nothing that anybody can still name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConflictError, LeaseHeldError, RayCkptError, TransientError
from ray_ckpt.core.hub_purge import HubPurge, HubWish, Objects
from ray_ckpt.core.observation import ExportView
from ray_ckpt.core.retention import KeepLatest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.hub.purge import plan_purge_on_hub, purge_on_hub
from tests.servers.hub import HubDouble
from tests.storage.copies.test_publish import make_export

TO, REPOSITORY = "hf://ray/model", "ray/model"
COMMON = b"a frozen part of every step" * 1000
SQUASH = HubWish(
    run_id="run",
    branch="main",
    policies=[KeepLatest(1)],
    held={6: "pinned: me"},
    pointers=frozenset({"latest"}),
    squash=True,
)
Wish = Callable[..., HubWish]


def nobody_took_over() -> None:
    """The guard of a manager that is alive."""


@dataclass(frozen=True)
class Place:
    """A root, and a repository with copies of its steps 5 to 8; `latest` leads to the newest."""

    hub: HubDouble
    catalog: Catalog
    exports: dict[int, ExportView]

    @property
    def api(self) -> HfApi:
        return self.hub.api()

    def purge(self, wish: HubWish = SQUASH) -> tuple[HubPurge, Objects]:
        return purge_on_hub(self.catalog.store, TO, wish, guard=nobody_took_over)

    def tags(self) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self.api.list_repo_refs(REPOSITORY).tags}

    def branches(self) -> set[str]:
        return {branch.name for branch in self.api.list_repo_refs(REPOSITORY).branches}

    def held(self) -> set[str]:
        """SHA-256 of every large file that is on the Hub."""
        return {path.name for path in (self.hub.folder / "lfs").iterdir()}

    def large(self, *steps: int) -> set[str]:
        return {
            entry.digest.removeprefix("sha256:")
            for step in steps
            for entry in self.exports[step].manifest.files
            if entry.path.endswith(".safetensors")
        }

    def expect_whole(self, reference: str, step: int, folder: Path) -> None:
        """Every file of the step comes from there, byte for byte."""
        cache = folder / f"cache-{reference}"
        path = Path(self.api.snapshot_download(REPOSITORY, revision=reference, cache_dir=cache))
        export = self.exports[step]
        assert (path / names.MANIFEST).read_bytes() == export.manifest.to_json()
        for entry in export.manifest.files:
            made = self.catalog.store.read(f"{names.export_dir('hf', step)}/{entry.path}")
            assert (path / entry.path).read_bytes() == made

    def expect_purged(self, folder: Path) -> None:
        """As SQUASH leaves it."""
        assert set(self.tags()) == {"step-6", "step-8", "latest"}
        assert self.branches() == {"main"}
        assert self.held() == self.large(6, 8)
        for reference, step in (("step-6", 6), ("step-8", 8), ("latest", 8), ("main", 8)):
            self.expect_whole(reference, step, folder)
            assert len(self.api.list_repo_commits(REPOSITORY, revision=reference)) == 1
        assert self.catalog.store.stat(names.hub_key(REPOSITORY)) is None


@pytest.fixture
def place(root: str, hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.api().create_repo(REPOSITORY)
    catalog = open_catalog(root)
    exports = {step: make_export(catalog, step, COMMON, b"%d" % step * 900) for step in range(5, 9)}
    for export in exports.values():
        publish_export(catalog, export, TO)
    hub.api().create_tag(REPOSITORY, tag="latest", revision="step-8")
    return Place(hub, catalog, exports)


def wish(**changes: object) -> HubWish:
    known = {name: getattr(SQUASH, name) for name in HubWish.__slots__}
    return HubWish(**{**known, **changes})  # type: ignore[arg-type]


def test_a_plan_says_what_would_go_and_changes_nothing(place: Place) -> None:
    before = len(place.hub.requests)
    planned = plan_purge_on_hub(TO, SQUASH)
    told = {verdict.step: verdict.reasons or (verdict.why_not,) for verdict in planned.verdicts}
    assert told == {
        5: ("kept by none of: latest 1",),
        6: ("pinned: me",),
        7: ("kept by none of: latest 1",),
        8: ("latest 1", "newest copy", "branch main leads to it", "tag latest leads to it"),
    }
    assert set(planned.freed) == place.large(5, 7) - place.large(8)
    assert planned.holding() == {}
    assert not any(line.startswith(("POST", "DELETE")) for line in place.hub.requests[before:])


def test_what_goes_is_gone_and_what_stays_is_whole(place: Place, tmp_path: Path) -> None:
    planned, freed = place.purge()
    assert set(planned.tags) == {"step-5", "step-7"}
    assert set(freed) == place.large(5, 7) - place.large(8)
    assert all(size == 900 for size in freed.values())
    place.expect_purged(tmp_path)


def test_a_second_purge_finds_nothing_to_do(place: Place, tmp_path: Path) -> None:
    place.purge()
    before = len(place.hub.requests)
    planned, freed = place.purge()
    assert (planned.tags, planned.squashed_tags, freed) == ({}, {}, {})
    lines = place.hub.requests[before:]
    assert not any(line.startswith(("POST", "DELETE", "PUT")) for line in lines)
    place.expect_purged(tmp_path)


def test_without_squash_the_history_keeps_the_content_and_is_said_to(place: Place) -> None:
    planned, freed = place.purge(wish(squash=False))
    assert freed == {}
    held = planned.holding()
    assert set(held) == {"branch main", "tag step-6", "tag step-8", "tag latest"}
    assert held["branch main"] > held["tag step-6"]
    assert set(place.tags()) == {"step-6", "step-8", "latest"}
    assert place.held() == place.large(5, 6, 7, 8)
    assert len(place.api.list_repo_commits(REPOSITORY)) == 5


def test_content_that_only_a_later_squash_frees_is_freed_then(place: Place, tmp_path: Path) -> None:
    place.purge(wish(squash=False))
    place.purge()
    place.expect_purged(tmp_path)


def test_a_copy_is_found_after_its_history_was_squashed(place: Place) -> None:
    place.purge()
    commits = place.api.list_repo_commits(REPOSITORY)
    assert publish_export(place.catalog, place.exports[8], TO).bytes_sent == 0
    assert place.api.list_repo_commits(REPOSITORY) == commits
    new = make_export(place.catalog, 9, COMMON, b"9" * 900)
    publish_export(place.catalog, new, TO)
    assert set(place.tags()) == {"step-6", "step-8", "step-9", "latest"}


def test_what_a_strangers_tag_has_in_its_history_stays(place: Place, tmp_path: Path) -> None:
    """And the tag itself, and a step that it leads to."""
    place.api.create_tag(REPOSITORY, tag="v1", revision="step-6")
    before = place.tags()["v1"]
    planned, freed = place.purge(wish(held={}))
    assert planned.holding() == {"tag v1": 900}
    assert set(freed) == place.large(7) - place.large(8)
    assert place.tags()["v1"] == before
    place.expect_whole("v1", 6, tmp_path)
    first = place.api.list_repo_commits(REPOSITORY, revision="v1")[1].commit_id
    place.expect_whole(first, 5, tmp_path)


def test_a_branch_that_has_the_name_of_a_tag_is_not_taken_for_it(
    place: Place, tmp_path: Path
) -> None:
    oid = place.tags()["step-5"]
    place.api.create_branch(REPOSITORY, branch="step-5", revision=oid)
    planned, _ = place.purge()
    assert "branch step-5 leads to it" in planned.verdicts[0].reasons
    place.expect_whole(oid, 5, tmp_path)


def test_tags_of_other_runs_and_of_people_stay(place: Place) -> None:
    place.api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPOSITORY)
    place.api.create_tag(REPOSITORY, tag="step-3", revision="main")
    planned, freed = place.purge(wish(run_id="another run"))
    assert (planned.verdicts, freed) == ((), {})
    planned, _ = place.purge()
    assert {verdict.step for verdict in planned.verdicts} == {5, 6, 7, 8}
    assert "step-3" in place.tags()
    assert place.large(5) <= place.held(), "it is behind step-3"


def test_what_a_branch_had_in_its_history_goes_once_the_branch_is_gone(
    place: Place, tmp_path: Path
) -> None:
    oid = place.tags()["step-7"]
    place.api.create_branch(REPOSITORY, branch="old", revision=oid)
    _, freed = place.purge()
    assert freed == {}
    place.expect_whole(oid, 7, tmp_path)
    place.api.delete_branch(REPOSITORY, branch="old")
    _, freed = place.purge()
    assert set(freed) == place.large(5, 7) - place.large(8)
    place.expect_purged(tmp_path)


def test_a_name_of_ours_that_leads_to_something_else_stays_where_it_is(place: Place) -> None:
    place.api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPOSITORY)
    place.api.delete_tag(REPOSITORY, tag="latest")
    place.api.create_tag(REPOSITORY, tag="latest", revision="main")
    before = place.tags()["latest"]
    planned, freed = place.purge()
    assert "tag latest" in planned.holding()
    assert (place.tags()["latest"], freed) == (before, {})


CHANGES = (
    "POST .*/super-squash/main",
    "POST .*/branch/ray_ckpt-moving-step-8",
    "POST .*/super-squash/ray_ckpt-moving-step-8",
    "DELETE .*/tag/step-8",
    "POST .*/tag/",
    "DELETE .*/branch/ray_ckpt-moving-step-8",
    "POST .*/super-squash/ray_ckpt-moving-latest",
    "DELETE .*/tag/latest",
    "DELETE .*/tag/step-5",
    "DELETE .*/tag/step-7",
    "POST .*/lfs-files/batch",
)


@pytest.mark.parametrize("is_carried_out", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_attempt_that_ends_at_any_change_is_ended_by_the_next(
    place: Place, tmp_path: Path, change: str, is_carried_out: bool
) -> None:
    """Scenario 49, on the Hub."""
    place.hub.fail(match=change, status=500, after=is_carried_out)
    with pytest.raises(TransientError):
        place.purge()
    assert place.large(6, 8) <= place.held()
    place.purge()
    place.expect_purged(tmp_path)


def test_a_manager_that_was_taken_over_changes_nothing(place: Place) -> None:
    def taken_over() -> None:
        raise LeaseHeldError("epoch 2 has taken over from our epoch 1")

    tags, held = place.tags(), place.held()
    with pytest.raises(LeaseHeldError):
        purge_on_hub(place.catalog.store, TO, SQUASH, guard=taken_over)
    assert (place.tags(), place.held()) == (tags, held)
    assert place.catalog.store.stat(names.hub_key(REPOSITORY)) is None


# ---- others, meanwhile ----


def test_what_somebody_names_right_before_it_would_go_stays(place: Place, tmp_path: Path) -> None:
    oid = place.tags()["step-5"]
    place.hub.meanwhile(
        match="DELETE .*/tag/step-5",
        do=lambda: place.api.create_branch(REPOSITORY, branch="mine", revision=oid),
    )
    _, freed = place.purge()
    assert set(freed) == place.large(7) - place.large(8)
    place.expect_whole("mine", 5, tmp_path)


def test_a_branch_that_has_moved_since_it_was_looked_at_is_not_squashed(place: Place) -> None:
    def commit() -> None:
        place.api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPOSITORY)

    tags, held = place.tags(), place.held()
    place.hub.meanwhile(match="GET .*/tree/" + place.tags()["step-8"], do=commit)
    with pytest.raises(ConflictError, match="main has moved since it was looked at"):
        place.purge()
    assert (place.tags(), place.held()) == (tags, held)
    assert len(place.api.list_repo_commits(REPOSITORY)) == 6


def test_what_somebody_commits_as_the_branch_is_squashed_is_there_and_called_no_copy(
    place: Place, tmp_path: Path
) -> None:
    def commit() -> None:
        place.api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPOSITORY)

    place.hub.meanwhile(match="POST .*/super-squash/main", do=commit)
    place.purge()
    (only,) = place.api.list_repo_commits(REPOSITORY)
    assert "Ray-Ckpt-Content" not in only.message
    path = place.api.hf_hub_download(REPOSITORY, "config.json", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == b"{}"
    place.expect_whole("step-8", 8, tmp_path)


def test_a_token_that_may_not_write_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = place.tags()
    monkeypatch.setenv("HF_TOKEN", place.hub.read_only_token)
    with pytest.raises(RayCkptError, match="403"):
        place.purge()
    assert place.tags() == tags
