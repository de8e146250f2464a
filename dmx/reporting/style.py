"""The style sheet of reports (style.css), and of charts that stand alone."""

from __future__ import annotations

import functools
from importlib import resources

from dmx.reporting.markup import Markup


@functools.cache
def sheet() -> Markup:
    """The whole style sheet; it ships with the package and holds nothing of a user's."""
    return Markup(resources.files("dmx.reporting").joinpath("style.css").read_text("utf-8"))
