"""A name at a destination leads to one of the copies there, from one moment to the next.

    /path                 <destination>/exports/<name>/latest    a symbolic link to step-<n>
    s3://bucket/prefix    <destination>/exports/<name>/latest    an object whose text is step-<n>
    hf://org/repo         the tag latest

`from_pretrained` loads it: by the path that ends with the link, or with `revision="latest"`. The
copy is looked at first, and no byte of it is touched. Nothing else here follows such a name: it is
no step.
"""

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import UsageError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.hub.repository import promote_on_hub
from ray_ckpt.storage.lease import Guard
from ray_ckpt.storage.listing import manifest_in


def promote_copy(publish: Action, pointer: str, *, content_id: str, guard: Guard) -> str:
    """Location of what leads to the copy that `publish` made, from now on. Twice is harmless.

    `content_id` is the copy's own; `guard` is asked right before the name moves.

    Raises:
        UsageError: the copy is gone or another one, or something else has the name; nothing moved.
        StorageError: from the destination.
    """
    assert publish.destination is not None, "a publish action names where it went"
    if names.is_repository(publish.destination):
        return promote_on_hub(publish, pointer, content_id=content_id, guard=guard)
    store = open_catalog(publish.destination).store
    return _promote_at_root(store, publish, pointer, content_id=content_id, guard=guard)


def _promote_at_root(
    store: Store, publish: Action, pointer: str, *, content_id: str, guard: Guard
) -> str:
    assert publish.export is not None, "and its export"
    folder = names.export_dir(publish.export.name, publish.step)
    step, key = names.step_dir(publish.step), names.pointer_key(publish.export.name, pointer)
    copy = manifest_in(store, folder)
    if copy is None or copy.content_id != content_id:
        raise _refused("it is gone, or another one", f"{store.uri}/{folder}", publish)
    now = store.pointed(key)
    if now is not None and names.parse_step(now) is None:
        raise _refused(f"{pointer} leads to {now} already", f"{store.uri}/{key}", publish)
    if now != step:
        guard()
        store.point(key, step)
    return f"{store.uri}/{key}"


def _refused(why: str, where: str, publish: Action) -> UsageError:
    return UsageError(
        f"the copy of {names.step_dir(publish.step)} is not promoted: {why}",
        where,
        "nothing was changed there",
        f"look at what is there, or copy it again: {publish.title}",
    )
