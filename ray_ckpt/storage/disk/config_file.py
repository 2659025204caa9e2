"""What a file says that a person has written: the text alone, which `core` makes sense of."""

from pathlib import Path

from ray_ckpt.core.errors import ConfigError


def config_text(path: Path) -> str:
    """The text of the file, in UTF-8 as TOML is.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise ConfigError(what, str(path), do="check its name, owner and mode") from error
    except UnicodeDecodeError as error:
        what = f"cannot be read: byte {error.start} is no UTF-8, so it is no TOML"
        raise ConfigError(what, str(path), do="name a TOML file, or save it as UTF-8") from error
