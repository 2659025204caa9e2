"""Pins on storage: `ray_ckpt.pin.<name>.json` in the folder of the step that they hold."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectNotFoundError
from ray_ckpt.core.pins import Pin
from ray_ckpt.storage.base import Store

log = logging.getLogger("ray_ckpt")


def write_pin(store: Store, step: int, pin: Pin) -> None:
    """The pin is there; one of the same name is replaced."""
    text = json.dumps(asdict(pin), sort_keys=True)
    store.write(names.pin_key(step, pin.name), text.encode())


def read_pins(store: Store, step: int, files: Iterable[str]) -> tuple[Pin, ...]:
    """The pins among the files of a step, by name; expired ones too. One read a pin."""
    found = (names.parse_pin(file) for file in files)
    pins = (_read(store, step, name) for name in sorted(name for name in found if name))
    return tuple(pin for pin in pins if pin is not None)


def _read(store: Store, step: int, name: str) -> Pin | None:
    """None if it is gone since it was listed. One that cannot be read holds for ever."""
    key = names.pin_key(step, name)
    try:
        pin = Pin(**json.loads(store.read(key)))
        pin.holds(0.0)
    except ObjectNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.warning("%s/%s cannot be read, and holds the step: %r", store.uri, key, error)
        return Pin(name=name, reason="unreadable")
    return pin
