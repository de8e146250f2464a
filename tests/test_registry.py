"""Registries: names, unknown names, and discovery by a new file alone."""

from __future__ import annotations

import sys

import pytest

from dmx.attention import ATTENTIONS
from dmx.errors import ConfigError
from dmx.registry import Registry, load_plugins
from dmx.tasks import task_for, task_names
from tests.tiny import one_sentence


def test_get_and_names():
    registry: Registry[int] = Registry("number")
    assert registry.register("two")(2) == 2
    registry.register("one")(1)
    assert registry.names() == ["one", "two"]
    assert registry.get("two") == 2
    assert "one" in registry and "three" not in registry and 5 not in registry


def test_unknown_name_lists_the_choices_and_guesses():
    registry: Registry[int] = Registry("number")
    for name in ("seven", "eleven"):
        registry.register(name)(0)
    with pytest.raises(ConfigError) as caught:
        registry.get("sevn")
    text = one_sentence(caught.value)
    assert text == "number 'sevn' is unknown; did you mean 'seven'? choices: eleven, seven."
    with pytest.raises(ConfigError, match=r"^number 'xyz' is unknown; choices: eleven, seven\.$"):
        registry.get("xyz")


def test_a_name_is_given_once():
    registry: Registry[int] = Registry("number")
    registry.register("one")(1)
    with pytest.raises(ConfigError, match="number 'one' is registered twice"):
        registry.register("one")(2)


def test_a_new_file_is_enough(tmp_path, monkeypatch):
    package = tmp_path / "kinds_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(
        "from dmx.registry import Registry\nKINDS = Registry('kind', 'kinds_for_a_test')\n"
    )
    (package / "apple.py").write_text(
        "from kinds_for_a_test.base import KINDS\nKINDS.register('apple')(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from kinds_for_a_test.base import KINDS  # type: ignore[import-not-found]

    assert "kinds_for_a_test.apple" not in sys.modules
    assert KINDS.names() == ["apple"]


def test_a_plugin_that_does_not_import_is_named(tmp_path, monkeypatch):
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmx.plugins]\nmine = module_of_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins.cache_clear()
    registry: Registry[int] = Registry("number")
    for ask in (load_plugins, registry.names, registry.names):
        with pytest.raises(ConfigError, match=r"plug-in module_of_mine of mine: .*No module named"):
            ask()
    (tmp_path / "module_of_mine.py").write_text("")
    load_plugins()
    assert "module_of_mine" in sys.modules


def test_what_dmx_has():
    assert ATTENTIONS.names() == sorted(
        ["butterfly", "softmax", "nystrom", "linformer", "performer", "reformer", "linear", "none"]
    )
    names = task_names()
    assert {"text", "listops", "retrieval", "image", "pathX-cl14_nogap"} <= set(names)
    assert "pathfinder128-curv_contour_length_14" in names
    for name in names:
        assert task_for(name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "txt", "pathfinder", "pathfinder33-curv_baseline", "pathX-cl14_alpha", "pathfinder32-cl9"],
)
def test_names_of_no_task(name):
    with pytest.raises(ConfigError) as caught:
        task_for(name)
    assert repr(name) in one_sentence(caught.value)


def test_a_failed_run_is_no_bad_input(capsys):
    from dmx.cli import options as cli
    from dmx.errors import RunFailedError, StageError

    def fails(argv):
        raise argv[0]

    for error, code in ((RunFailedError("it failed"), 1), (StageError("it is locked"), 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.run("dmx.tune", fails, [error])
        assert stopped.value.code == code
        assert capsys.readouterr().err == f"dmx.tune: {error}\n"
