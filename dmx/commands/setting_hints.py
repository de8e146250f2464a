"""What an option that does not exist may mean: a setting, which is given in another way."""

from __future__ import annotations

from collections.abc import Callable


def as_setting(form: str) -> Callable[[str], str]:
    """A hint for cli.Parser; `form` is how the command takes a setting: `--set {}=VALUE`."""

    def hint(option: str) -> str:
        from dmx.config import similar_settings  # torch: seconds, which a right command is spared

        names = similar_settings(option, attention="none")
        return form.format(names) if names else ""

    return hint
