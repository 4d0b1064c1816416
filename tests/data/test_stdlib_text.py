from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from vpipe.data.text.stdlib import docstrings_of, stdlib_corpus
from vpipe.errors import DataError

SOURCE = b'''
"""Module."""
import does_not_exist
class A:
    """A."""
    def f(self):
        """F."""
        if True:
            async def g():
                """G."""
        "no docstring"
try:
    pass
except ValueError:
    def h():
        """H."""
def blank():
    """   """
text = """no docstring either"""
def last():
    "Last."
'''


def test_docstrings_in_the_order_of_the_text() -> None:
    assert docstrings_of(SOURCE) == ["Module.", "A.", "F.", "G.", "H.", "Last."]


@pytest.mark.parametrize("source", [b"def f(:", b"\0", b'"\\d"'])
def test_broken_and_old_sources_are_quiet(source: bytes, recwarn: pytest.WarningsRecorder) -> None:
    docstrings_of(source)
    assert not recwarn.list


def test_modules_and_topics_become_documents(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text('"""Not the library."""')
    (tmp_path / "b.py").write_text('"""B."""\ndef f():\n    """Shared."""\ndef g():\n    """Shared."""')
    (tmp_path / "a.py").write_text('"""A."""\ndef f():\n    """Shared."""')
    (tmp_path / "none.py").write_text("x = 1")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'y': 'Why\\n', 'x':  'Ex\\n  indented'}")
    corpus = stdlib_corpus(root=tmp_path)
    assert corpus.documents == ("A.\n\nShared.", "B.", "Ex\nindented", "Why")
    assert [origin.num_documents for origin in corpus.origins] == [2, 2]
    assert not corpus.from_files


def test_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no sources to read text from; give --input FILE"):
        stdlib_corpus(root=tmp_path)


def test_the_running_python(tmp_path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "pydoc_data"):
        shutil.copytree(library / package, tmp_path / package)
    modules_before = set(sys.modules)
    steps: list[tuple[int, int]] = []
    corpus = stdlib_corpus(lambda step, done, total: steps.append((done, total)), root=tmp_path)
    assert sum(map(len, corpus.documents)) > 400_000
    assert len(corpus.documents) > 80
    assert any("event loop" in document for document in corpus.documents)
    assert any("comprehension" in document for document in corpus.documents)
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1] == len(list(tmp_path.rglob("*.py")))
    assert set(sys.modules) == modules_before


def test_the_running_python_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text('"""Only this."""')
    monkeypatch.setattr("sysconfig.get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert stdlib_corpus().documents == ("Only this.",)
