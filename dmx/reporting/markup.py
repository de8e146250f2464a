"""HTML and SVG elements whose texts are always escaped."""

from __future__ import annotations

import html
import re

Attribute = str | int | float | None
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9:-]*")
_VOID = {"meta", "br", "hr", "link"}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")


class Markup(str):
    """Text that is markup already and is not escaped again; only `el` and `join` make it."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any text as it may stand in an element or in a quoted attribute."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True))


def join(*parts: object) -> Markup:
    """Texts (escaped) and markup, one after another; None is nothing."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def el(tag: str, *children: object, **attributes: Attribute) -> Markup:
    """An element. `class_` is `class`, `_` in names is `-`; None attributes are left out."""
    assert _NAME.fullmatch(tag), tag
    pairs = []
    for name, value in attributes.items():
        if value is None:
            continue
        name = name.rstrip("_").replace("_", "-")
        assert _NAME.fullmatch(name), name
        text = f"{value:.6g}" if isinstance(value, float) else value
        pairs.append(f' {name}="{escape(text)}"')
    opening = f"<{tag}{''.join(pairs)}"
    if tag in _VOID:
        return Markup(opening + ">")
    return Markup(f"{opening}>{join(*children)}</{tag}>")
