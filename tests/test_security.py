"""What no file of dmx may do, and what no input may make it do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dmx.errors import ConfigError
from dmx.study.folder import run_folder
from tests.tiny import one_sentence

ROOT = Path(__file__).resolve().parents[1]
FILES = [p for folder in ("dmx", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))]

FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "pickle.load"),
    *("pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tarfile.extractall"),
}
WANTED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_shell_no_eval_no_free_pickle(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called, where = ast.unparse(node.func), f"{path}:{node.lineno}"
        own = "scripts" in path.parts and called == "pickle.load"  # what it just wrote
        assert called not in FORBIDDEN or own, where
        assert not called.endswith((".extractall", ".extract")), where
        words = {k.arg: k.value for k in node.keywords}
        if called.startswith("subprocess."):
            shell = words.get("shell")
            assert shell is None or ast.unparse(shell) == "False", where
            assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), where
        if called in WANTED:
            name, value = WANTED[called]
            given = words.get(name)
            assert isinstance(given, ast.Constant) and given.value is value, where


NAMES = ["../x", "/etc/x", "a/b", "a\\b", "..", ".", ".hidden", "", "a\0b", "a\nb", "\x1b[31m"]


@pytest.mark.parametrize("name", [*NAMES, "x" * 256, "é" * 128])
def test_names_that_are_paths_or_worse(tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        run_folder(str(tmp_path / "runs"), name, "default")
    one_sentence(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_message_cannot_steer_the_terminal():
    shown = str(ConfigError("value '\x1b[2J\r\n\x00é' is wrong."))
    assert shown == "value '\\x1b[2J\\r\\n\\x00é' is wrong."
