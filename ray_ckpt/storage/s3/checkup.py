"""What a bucket does by itself, and what a person should know of it before a run. Looks only."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, cast

from ray_ckpt.core.errors import AuthorizationError, ObjectNotFoundError, StorageError
from ray_ckpt.core.findings import Finding, ok, problem, warning
from ray_ckpt.core.garbage import ABANDONED_AFTER_S, duration
from ray_ckpt.core.store_features import weaknesses
from ray_ckpt.storage.s3.errors import is_unknown
from ray_ckpt.storage.s3.store import S3Store

Rule: TypeAlias = Mapping[str, Any]
_OUT_OF_REACH = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""What lies there must be asked for hours before it is read."""


def look_at_store(store: S3Store) -> Iterator[Finding]:
    """What the store does of what is relied on: asked anew, and remembered."""
    found = weaknesses(store.features.find_out(), store.uri)
    yield from found or [ok("the store does all that is relied on", store.uri)]


def look_at_bucket(store: S3Store, *, now: float) -> Iterator[Finding]:
    """Its rules, its versions, and uploads that nobody has ended."""
    rules = _rules(store)
    if rules is None:
        yield warning(
            "whether the bucket's rules delete what is here cannot be seen: not allowed",
            store.uri,
            "ask its owner, or for s3:GetLifecycleConfiguration",
        )
    else:
        yield from _of_rules(store, [rule for rule in rules if _is_about(rule, _prefix(store))])
    yield from _of_uploads(store, now)


def _prefix(store: S3Store) -> str:
    return store.uri.removeprefix("s3://").partition("/")[2] + "/"


def _rules(store: S3Store) -> list[Rule] | None:
    """Every rule that is switched on; None where nobody may look."""
    try:
        answer = store.request("", "get_bucket_lifecycle_configuration", Bucket=store.bucket)
    except ObjectNotFoundError:
        return []
    except AuthorizationError:
        return None
    except StorageError as error:
        if not is_unknown(error):
            raise
        return []
    rules = cast(list[Rule], answer.get("Rules") or [])
    return [rule for rule in rules if rule.get("Status") == "Enabled"]


def _is_about(rule: Rule, prefix: str) -> bool:
    """Whether an object of ours can be meant: none has a tag."""
    chosen: Mapping[str, Any] = rule.get("Filter") or {}
    both: Mapping[str, Any] = chosen.get("And") or chosen
    if both.get("Tag") or both.get("Tags"):
        return False
    start = str(both.get("Prefix") or rule.get("Prefix") or "")
    return prefix.startswith(start) or start.startswith(prefix)


def _of_rules(store: S3Store, rules: list[Rule]) -> Iterator[Finding]:
    harmful = [text for rule in rules for text in _harm(rule)]
    for text in harmful:
        yield problem(
            f"{text}: checkpoints, exports and records of this run as well, pinned or not",
            store.uri,
            "change the rule, or keep the run under a prefix that it does not name",
        )
    if not harmful:
        yield ok("no rule of the bucket deletes what is here", store.uri)
    if not any("AbortIncompleteMultipartUpload" in rule for rule in rules):
        yield warning(
            "no rule of the bucket ends uploads that nobody goes on with; they cost and are not "
            "listed. Those of ray_ckpt end with ray-ckpt gc, those of others do not",
            store.uri,
            "add a rule with AbortIncompleteMultipartUpload: DaysAfterInitiation 7",
        )
    if _is_versioned(store) and not any("NoncurrentVersionExpiration" in rule for rule in rules):
        yield warning(
            "the bucket keeps a version of everything that is deleted or replaced: a purge frees "
            "nothing, and each heartbeat stays for ever",
            store.uri,
            "add a rule with NoncurrentVersionExpiration: NoncurrentDays 1, or switch it off",
        )


def _harm(rule: Rule) -> Iterator[str]:
    """What the rule does to objects, as sentences."""
    name = rule.get("ID") or "without a name"
    expiration: Mapping[str, Any] = rule.get("Expiration") or {}
    if expiration.get("Days") or expiration.get("Date"):
        yield f"the bucket's rule {name} deletes {_when(expiration)}"
    for move in cast(Iterable[Mapping[str, Any]], rule.get("Transitions") or []):
        if move.get("StorageClass") in _OUT_OF_REACH:
            yield f"the bucket's rule {name} moves to {move['StorageClass']} {_when(move)}"


def _when(rule: Mapping[str, Any]) -> str:
    if rule.get("Date"):
        return f"on {rule['Date']:%Y-%m-%d} what is here"
    return f"what is {rule.get('Days', 0)} days old"


def _is_versioned(store: S3Store) -> bool:
    try:
        answer = store.request("", "get_bucket_versioning", Bucket=store.bucket)
    except StorageError:
        return False
    return answer.get("Status") == "Enabled"


def _of_uploads(store: S3Store, now: float) -> Iterator[Finding]:
    old = [
        write for write in store.list_unfinished("") if now - write.changed_at >= ABANDONED_AFTER_S
    ]
    if old:
        idle_s = now - min(write.changed_at for write in old)
        size_bytes = sum(write.size_bytes for write in old)
        yield warning(
            f"{len(old)} uploads were begun and never ended, {size_bytes} bytes, the oldest "
            f"{duration(idle_s)} ago",
            store.uri,
            f"ray-ckpt gc {store.uri} --apply ends ours; aws s3api list-multipart-uploads "
            f"--bucket {store.bucket} shows all",
        )
