"""How s3fs is asked to talk to an S3 server: how long it waits, and how often it tries.

What a person has set the ecosystem's way has its say: fsspec's configuration for `s3` (its
`config_kwargs` one by one), `AWS_MAX_ATTEMPTS`, `AWS_RETRY_MODE`, a profile. Our own values:

    CONNECT_S 5     s3fs's own: a server on the same continent answers within one
    SILENCE_S 25    not a byte came, or none of ours was taken. It is counted anew with every byte,
                    so a transfer may be as slow as it likes. The longest silence of a server that
                    is well is the completion of a large upload: seconds, on AWS filled with spaces
    ATTEMPTS  3     in all, by botocore alone, which waits between them. s3fs would try five times
                    around that, and where it reads five times around these: half an hour

So a server that accepts and never answers is known as one after 80 seconds; 25 later, where a
socket of our own was tried first (`wire.py`).
"""

import functools
import socket
from functools import partial
from typing import Any, cast

CONNECT_S = 5
SILENCE_S = 25
ATTEMPTS = 3


def make_file_system() -> Any:
    """An `s3fs.S3FileSystem` whose every request ends; it has touched nothing yet.

    Whoever makes another one gets the credentials that the environment and its files hold then.
    """
    import fsspec.config  # pyright: ignore[reportMissingTypeStubs]
    import s3fs  # pyright: ignore[reportMissingTypeStubs]  # heavy, and needed only where there is an s3:// location
    from aiobotocore.session import AioSession  # pyright: ignore[reportMissingTypeStubs]

    asked: dict[str, Any] = cast(Any, fsspec.config).apply_config(s3fs.S3FileSystem, {})
    session: Any = asked.get("session") or AioSession(profile=asked.get("profile"))
    data_path = session.get_config_variable("data_path")
    session.register_component("data_loader", _descriptions(data_path))
    # aiohttp waits for the answer to `Expect` without an end
    session.register("before-send.s3", _without_expect, unique_id="ray_ckpt")
    file_system: Any = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        session=session,
        config_kwargs=_patience(session, asked.get("config_kwargs", {})),
    )
    file_system.retries = 1
    return file_system


@functools.cache
def _descriptions(data_path: str | None) -> Any:
    """What botocore knows of services: 60 ms of parsing, which each session would do anew."""
    from botocore import loaders  # pyright: ignore[reportMissingTypeStubs]

    return cast(Any, loaders).create_loader(data_path)


def _patience(session: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Options of botocore's client; of its attempts only if nobody else has said how many."""
    patience: dict[str, Any] = {"connect_timeout": CONNECT_S, "read_timeout": SILENCE_S}
    if session.get_config_variable("max_attempts") is None:
        patience["retries"] = {"total_max_attempts": ATTEMPTS}
    patience |= asked
    return _for_sent_bytes(patience["read_timeout"]) | patience


def _for_sent_bytes(silence_s: float) -> dict[str, Any]:
    """The same patience for bytes that the server does not take: aiohttp has none for them."""
    from aiobotocore.config import AioConfig  # pyright: ignore[reportMissingTypeStubs]
    from botocore.exceptions import ParamValidationError  # pyright: ignore[reportMissingTypeStubs]

    options = {"connector_args": {"socket_factory": partial(_socket, silence_s)}}
    try:
        AioConfig(**options)
    except ParamValidationError:
        return {}  # this version lets nobody make its sockets
    return options


def _socket(silence_s: float, address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux alone
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silence_s))
    return made


def _without_expect(request: Any, **_: Any) -> None:
    """The body is sent at once, not after the server has said that it wants it."""
    request.headers.pop("Expect", None)
