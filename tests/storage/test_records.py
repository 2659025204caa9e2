"""What `.ray_ckpt/` remembers, and that losing it is no harm."""

import pickle

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.observation import Request
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.records import Records, Run

POLICY = LifecyclePolicy(
    export=(ExportPolicy(name="hf", every_steps=10, dtype="float32"),),
    publish=(PublishPolicy(export="hf", to="hf://org/repo", required=False),),
    keep=KeepConfig(latest=3, best=2, best_metric="acc", best_order="max"),
)
VERIFY = Action(kind=ActionKind.VERIFY, step=5, source_id="a")
EXPORT = Action(kind=ActionKind.EXPORT, step=5, source_id="a", export=ExportSpec(name="hf"))


@pytest.fixture
def records(root: str) -> Records:
    return Records(open_catalog(root).store)


def test_a_root_that_no_run_has_written_to_has_no_run(records: Records) -> None:
    assert records.run() is None
    assert records.actions() == {}
    assert records.requests() == ()


def test_a_run_is_read_back_with_its_policy(records: Records) -> None:
    begun = records.begin_run("llama-1", POLICY)
    assert begun == Run(run_id="llama-1", policy=POLICY)
    assert records.run() == begun


def test_a_second_start_keeps_the_id_and_the_policy(records: Records) -> None:
    records.begin_run("llama-1", POLICY)
    assert records.begin_run("llama-2", None) == Run(run_id="llama-1", policy=POLICY)


def test_a_second_start_with_a_policy_replaces_the_policy(records: Records) -> None:
    records.begin_run("llama-1", POLICY)
    records.begin_run("llama-2", LifecyclePolicy())
    assert records.run() == Run(run_id="llama-1", policy=LifecyclePolicy())


def test_a_run_without_a_policy_keeps_everything(records: Records) -> None:
    assert records.begin_run("llama-1", None).policy.keep == KeepConfig()


def test_a_policy_of_another_version_is_refused_by_name(root: str, records: Records) -> None:
    text = b'{"run_id": "llama-1", "policy": {"kep": {}}}'
    open_catalog(root).store.write(names.RUN, text)
    with pytest.raises(ConfigError, match="unknown key 'kep'") as caught:
        records.run()
    assert caught.value.where == f"{root}/{names.RUN}"


def test_an_action_that_was_never_started_has_a_fresh_record(records: Records) -> None:
    assert records.action(VERIFY) == ActionRecord(action=VERIFY)
    assert records.actions() == {}


def test_records_are_found_under_their_actions_keys(records: Records) -> None:
    started = ActionRecord(action=VERIFY).started(1.0)
    waiting = ActionRecord(action=EXPORT)
    records.write_action(ActionRecord(action=VERIFY))
    records.write_action(started)
    records.write_action(waiting)
    assert records.actions() == {VERIFY.key: started, EXPORT.key: waiting}
    assert records.action(VERIFY) == started


def test_a_forgotten_action_counts_as_never_started(records: Records) -> None:
    records.write_action(ActionRecord(action=VERIFY).started(1.0))
    records.forget_action(VERIFY)
    records.forget_action(EXPORT)
    assert records.action(VERIFY).state is ActionState.PENDING
    assert records.actions() == {}


def test_asking_twice_is_asking_once(records: Records) -> None:
    export = Request(step=5, export=ExportSpec(name="hf"))
    copy = Request(step=5, export=ExportSpec(name="hf"), destination="/copies")
    checkpoint = Request(step=5, destination="/copies", verify="digests")
    for request in (export, copy, checkpoint, export):
        records.add_request(request)
    found = records.requests()
    assert len(found) == 3
    assert all(request in found for request in (export, copy, checkpoint))
    records.settle_request(copy)
    records.settle_request(checkpoint)
    assert records.requests() == (export,)


def test_a_damaged_record_is_told_of_and_left_out(
    root: str, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    records.add_request(Request(step=5, export=ExportSpec(name="hf")))
    open_catalog(root).store.write(names.request_key("damaged"), b"{")
    open_catalog(root).store.write(names.action_key("damaged"), b"[]")
    assert len(records.requests()) == 1
    assert records.actions() == {}
    assert caplog.text.count("cannot be read") == 2


def test_what_was_read_stays_in_its_process(records: Records) -> None:
    for action in (VERIFY, EXPORT):
        records.write_action(ActionRecord(action=action))
    size_bytes = len(pickle.dumps(records))
    assert len(records.actions()) == 2
    assert len(pickle.dumps(records)) == size_bytes
    assert pickle.loads(pickle.dumps(records)).actions() == records.actions()


def test_losing_all_records_leaves_an_empty_memory(root: str, records: Records) -> None:
    records.begin_run("llama-1", POLICY)
    records.write_action(ActionRecord(action=VERIFY))
    records.add_request(Request(step=6, export=ExportSpec(name="hf")))
    store = open_catalog(root).store
    store.delete([info.key for info in store.list_objects(names.PRIVATE)])
    assert (records.run(), records.actions(), records.requests()) == (None, {}, ())


def test_no_secret_of_an_error_is_written_down(root: str, records: Records) -> None:
    secret = "hf_" + "x" * 30
    failed = ActionRecord(action=EXPORT).started(1.0).failed(OSError(f"401 for {secret}"), 2.0)
    records.write_action(failed)
    read = records.action(EXPORT)
    assert (read.error, read.first_error) == ("401 for <hidden>",) * 2
    assert secret.encode() not in open_catalog(root).store.read(names.action_key(EXPORT.key))
