"""What an object store does of that which is relied on, and what it means where it does not. Pure.

    creates              PUT with If-None-Match:*: refused where something is, one of several wins
    checks_checksums     bytes that differ from the checksum sent with them are refused
    lists_at_once        a listing shows what was written before it, and not what was deleted
    lists_uploads        unfinished multipart uploads can be found
    deletes_in_batches   several objects are deleted by one request
    copies               an object is copied without passing through here

AWS does all of it. Nothing relies on If-Match, on versions or on tags.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

from ray_ckpt.core.findings import Finding, problem, warning


class Creates(StrEnum):
    """What becomes of a PUT that must not replace anything."""

    EXCLUSIVE = "exclusive"
    RACY = "racy"
    """Refused where something is; but of several at once more than one succeeds."""
    IGNORED = "ignored"
    """It replaces what is there."""
    REFUSED = "refused"
    """The store does not know such a request."""


_CREATES_SO = {
    Creates.RACY: "of several that create one object at once more than one succeeds",
    Creates.IGNORED: "If-None-Match is ignored, so that a second writer replaces the first",
    Creates.REFUSED: "it does not know If-None-Match",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFeatures:
    """Of one store, as far as somebody has found out; the rest is as on AWS."""

    creates: Creates = Creates.EXCLUSIVE
    checks_checksums: bool = True
    lists_at_once: bool = True
    lists_uploads: bool = True
    deletes_in_batches: bool = True
    copies: bool = True

    def to_json(self) -> bytes:
        """As it is remembered."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()

    @staticmethod
    def from_json(text: bytes) -> "StoreFeatures | None":
        """What is remembered; None if that cannot be read, or another version wrote it."""
        try:
            document = json.loads(text)
            creates = Creates(document.pop("creates"))
            return StoreFeatures(creates=creates, **document)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def weaknesses(features: StoreFeatures, where: str) -> tuple[Finding, ...]:
    """What the store lacks, what is done instead, and what a person may do; empty on AWS."""
    return (*_of_creates(features, where), *_of_the_rest(features, where))


def _of_creates(features: StoreFeatures, where: str) -> Iterator[Finding]:
    so = _CREATES_SO.get(features.creates)
    if so is None:
        return
    if features.lists_at_once:
        yield warning(
            f"{so}; who creates an object is elected by ray_ckpt itself, with seven requests more",
            where,
            "nothing needs to be done: it is safe, and slower",
        )
        return
    yield problem(
        f"{so}, and its listings are late: of two trainers or managers that start at the same "
        "moment both may take the root for theirs",
        where,
        "start one at a time, a minute apart, or keep the root on another store",
    )


def _of_the_rest(features: StoreFeatures, where: str) -> Iterator[Finding]:
    if not features.lists_at_once:
        yield warning(
            "its listings do not show at once what was written or deleted",
            where,
            "nothing needs to be done: what is not seen yet is done in a later round",
        )
    if not features.checks_checksums:
        yield warning(
            "it stores bytes that differ from their checksum; manifests and leases are read back",
            where,
            "use https, leave steps to be verified, and look at copies with ray-ckpt copies ROOT",
        )
    if not features.lists_uploads:
        yield warning(
            "nobody can ask it for unfinished uploads: what a killed one has sent is sent again, "
            "stays there and costs",
            where,
            "have its operator remove unfinished uploads after some days",
        )
    if not features.deletes_in_batches:
        yield warning(
            "it deletes one object a request: purges take longer",
            where,
            "nothing needs to be done",
        )
    if not features.copies:
        yield problem(
            "it copies no object by itself, so that nothing can be moved to the trash",
            where,
            "keep the root on another store, or let no policy purge",
        )
