"""Pins on storage: `ray_ckpt.pin.<name>.json` in the folder of the step that they hold."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectNotFoundError
from ray_ckpt.core.pins import Pin
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store

log = logging.getLogger("ray_ckpt")


def write_pin(store: Store, step: int, pin: Pin) -> None:
    """The pin is there; one of the same name is replaced."""
    text = json.dumps(asdict(pin), sort_keys=True)
    store.write(names.pin_key(step, pin.name), text.encode())


def read_pins(store: Store, folder: str, files: Iterable[str]) -> tuple[Pin, ...]:
    """The pins among the files of a step's folder, by name; expired ones too. One read a pin."""
    listed = sorted(file for file in files if names.parse_pin(file))
    read = at_once(lambda file: _read(store, f"{folder}/{file}"), listed)
    return tuple(pin for pin in read if pin is not None)


def _read(store: Store, key: str) -> Pin | None:
    """None if it is gone since it was listed. One that cannot be read holds for ever."""
    try:
        pin = Pin(**json.loads(store.read(key)))
        pin.holds(0.0)
    except ObjectNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.warning("%s/%s cannot be read, and holds the step: %r", store.uri, key, error)
        name = names.parse_pin(key.rpartition("/")[2])
        return Pin(name=name or key, reason="unreadable")
    return pin
