"""HTML and SVG as nested calls: whatever is not markup already is escaped."""

import html


class Markup(str):
    """Text that is markup, and not escaped again."""

    __slots__ = ()


def tag(name: str, *inside: str | None, **attributes: str | float) -> Markup:
    """`<name ...>inside</name>`; `class_` is `class`, and `_` in other attributes is `-`.

    >>> tag("p", "a < b", class_="x")
    '<p class="x">a &lt; b</p>'
    """
    told = "".join(f' {_name(key)}="{_value(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{told}>{join(*inside)}</{name}>")


def join(*parts: str | None) -> Markup:
    """One after the other; None is nothing."""
    return Markup("".join(_escaped(part) for part in parts if part is not None))


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-") if key != "viewBox" else key


def _value(value: str | float) -> str:
    return html.escape(value) if isinstance(value, str) else f"{value:.6g}"
