"""One name for a tensor, whoever has wrapped the module that holds it."""

from collections.abc import Sequence

_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def canonical_fqn(name: str) -> str:
    """`name` without the segments that activation checkpointing and torch.compile put in."""
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name


def told(names: Sequence[str], *, limit: int = 30) -> str:
    """The names as a message lists them: all, unless there are very many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
