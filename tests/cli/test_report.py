"""`ray-ckpt report` as a person meets it: one page, whole, that needs nothing else."""

import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ray_ckpt.core.events import Event, utc
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.history import EventReader, append_events
from tests.cli.conftest import Answer
from tests.roots import flip_byte, make_root, snapshot

Cli = Callable[..., Answer]
EVIL = "<script src='https://evil.example/x.js'>alert(1)</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """A page's elements, texts and attributes; refuses what is not nested as it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def open_page(path: Path) -> Page:
    return Page(path.read_text())


@pytest.fixture
def run_root(root: str, cli: Cli, tmp_path: Path) -> str:
    """A run in which a lot has happened."""
    make_root(root, (10, 20, 30, 40, 50))
    flip_byte(Path(root, "step-20/__0_0.distcp"))
    assert cli("export", root, "--step", 20).code == 1
    assert cli("export", root, "--step", 50, "--to", tmp_path / "copies").code == 0
    (tmp_path / "file").write_text("in the way")
    assert cli("export", root, "--step", 40, "--to", tmp_path / "file/x").code != 0
    assert cli("purge", root, "--keep-latest", 2, "--apply").code == 0
    cli("pin", root, 50, "--reason", EVIL)
    failed = Event(
        id="1", at=utc(time.time()), who=f"trainer {EVIL}", what="save.failed", step=60, text=EVIL
    )
    append_events(open_catalog(root).store, [failed])
    return root


def test_the_page_tells_of_every_step_and_every_fault(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    before = snapshot(run_root)
    answer = cli("report", run_root, "-o", tmp_path / "run.html", "--json")
    assert answer.code == 0
    assert snapshot(run_root) == before
    page = open_page(tmp_path / "run.html")
    catalog = open_catalog(run_root)
    listed = {row[0]: row[1] for row in page.rows if len(row) > 3 and row[0].isdigit()}
    expected = {str(view.step): str(view.state) for view in catalog.observe().checkpoints}
    assert listed == expected
    assert set(listed.values()) == {"trashed", "quarantined", "verified"}
    events = EventReader(catalog.store).read()
    faults = [e for e in events if e.what in ("save.failed", "action.dead", "action.retry_wait")]
    faults += [e for e in events if e.what == "checkpoint.quarantined"]
    assert len(faults) >= 3
    cells = {cell for row in page.rows for cell in row}
    assert {event.text for event in events} <= cells
    assert answer.json["faults"] == len(faults)
    text = "".join(page.texts)
    assert "Of these steps nothing but events is left: 60" in text
    for record in catalog.records.actions().values():
        assert record.action.title in cells
        if record.error:
            assert record.error in page.texts
    assert f"ray-ckpt retry {run_root} --step 40 --kind publish" in page.texts
    assert "loss 0.02" in cells
    assert page.tags.count("svg") == 3


def test_the_page_needs_nothing_else_and_runs_nothing(
    cli: Cli, run_root: str, tmp_path: Path
) -> None:
    cli("report", run_root, "-o", tmp_path / "run.html")
    page = open_page(tmp_path / "run.html")
    assert any(EVIL in text for text in page.texts)
    assert not {"script", "img", "link", "iframe", "a", "base", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name in names)
    assert not names & {"href", "src", "srcset", "action", "style", "xlink:href"}
    (style,) = [text for text in page.texts if "--ink" in text]
    assert "url(" not in style
    assert "@import" not in style
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes


def test_secrets_are_not_shown(cli: Cli, root: str, tmp_path: Path) -> None:
    token = "hf_" + "a" * 30
    event = Event(id="1", at=utc(1e9), who="a", what="save.failed", step=1, text=f"said {token}")
    append_events(open_catalog(root).store, [event])
    cli("report", root, "-o", tmp_path / "run.html")
    assert token not in (tmp_path / "run.html").read_text()
    assert "said <hidden>" in open_page(tmp_path / "run.html").texts


def test_a_run_that_has_not_begun_has_a_page_named_after_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    answer = cli("report", tmp_path / "run")
    (path,) = tmp_path.glob("run-*.html")
    assert answer.out.startswith(f"{path.name}: 0 checkpoints, 0 events, 0 faults")
    assert "no event was told yet" in "".join(open_page(path).texts)


def test_a_place_that_cannot_be_written_is_named(cli: Cli, root: str, tmp_path: Path) -> None:
    Path(root).mkdir()
    (tmp_path / "file").write_text("")
    answer = cli("report", root, "-o", tmp_path / "file/run.html")
    assert answer.code in (2, 3)
    assert f"{tmp_path}/file/run.html" in answer.err


@pytest.mark.s3
def test_the_run_may_lie_on_s3(cli: Cli, s3_root: str, tmp_path: Path) -> None:
    make_root(s3_root, (10, 20))
    cli("report", s3_root, "-o", tmp_path / "run.html")
    rows = [row for row in open_page(tmp_path / "run.html").rows if row[0] in ("10", "20")]
    assert [row[:2] for row in rows] == [["20", "committed"], ["10", "committed"]]
