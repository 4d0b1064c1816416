"""Functions of the user's own."""

import pytest

from vpipe.config.entry import load_entry
from vpipe.errors import ConfigError


def write(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return tmp_path


def test_a_file_is_found_beside_the_config_or_by_its_full_path(tmp_path):
    write(tmp_path, "def build(size=2): return size * 2")
    assert load_entry("model.entry", "mine.py:build", tmp_path)(size=4) == 8
    assert load_entry("model.entry", f"{tmp_path}/mine.py:build", "/elsewhere")() == 4


def test_a_module_is_found_by_its_name():
    assert load_entry("model.entry", "os.path:join")("a", "b") == "a/b"


def test_files_of_one_name_stay_apart_and_each_is_imported_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, f"def build(): return '{name}'")
    first, second = (load_entry("model.entry", "mine.py:build", tmp_path / name) for name in ("a", "b"))
    assert (first(), second()) == ("a", "b")
    assert load_entry("model.entry", "mine.py:build", tmp_path / "a") is first


def test_files_may_hold_dataclasses(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Made:\n    size: int"
    )
    assert load_entry("model.entry", "mine.py:Made", write(tmp_path, text))(3).size == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("build", "'build' is no entry; write 'file.py:function' or 'package.module:function'"),
        ("mine.py:", "'mine.py:' is no entry"),
        (":build", "':build' is no entry"),
        ("mine.py:a.b", "'mine.py:a.b' is no entry"),
        ("gone.py:build", "'gone.py:build' names the file '{}/gone.py', which does not exist"),
        (
            "no_such_module:build",
            "names the module 'no_such_module', which is not installed; for a file write its path with",
        ),
        ("json.nothing:build", "names the module 'json.nothing', which is not installed"),
        ("mine.py:bulid", "'mine.py' has no function 'bulid'; it has build"),
        ("mine.py:SIZE", "'mine.py' has 'SIZE', which is no function; it has build"),
    ],
)
def test_entries_that_lead_nowhere_are_refused(tmp_path, entry, message):
    write(tmp_path, "SIZE = 3\ndef build(): pass\ndef _hidden(): pass")
    with pytest.raises(ConfigError) as error:
        load_entry("model.entry", entry, tmp_path)
    assert message.format(tmp_path) in str(error.value)


def test_an_import_that_fails_keeps_its_cause_and_may_be_tried_again(tmp_path, monkeypatch):
    for name in ("mine.py", "mine_module.py"):
        write(tmp_path, "import no_such_thing", name)
    monkeypatch.syspath_prepend(tmp_path)
    for entry in ("mine.py:build", "mine.py:build", "mine_module:build"):
        with pytest.raises(
            ConfigError, match=r"importing '.*mine.*' failed: .*No module named 'no_such_thing'"
        ) as error:
            load_entry("model.entry", entry, tmp_path)
        assert isinstance(error.value.__cause__, ModuleNotFoundError)
    write(tmp_path, "1 / 0", "zero_module.py")
    with pytest.raises(ConfigError, match="importing 'zero_module' failed: ZeroDivisionError"):
        load_entry("model.entry", "zero_module:build")
