"""The text that every Python brings along: the docstrings of its standard library and the language reference.

About 11,000 docstrings (2.2 MB) and 80 reference topics (0.5 MB without indentation) of real English, with nothing to
download. The files are parsed, never imported. What is there depends on the Python (some Linux distributions leave out
the tests or the reference); for one Python it is always the same.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from vpipe.data.progress import Progress, no_progress
from vpipe.data.text.corpus import Corpus, TextOrigin
from vpipe.errors import DataError

__all__ = ["docstrings_of", "stdlib_corpus"]

_NOT_STDLIB = {"site-packages", "dist-packages"}
_TOPICS = "pydoc_data/topics.py"

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_corpus(progress: Progress = no_progress, root: Path | None = None) -> Corpus:
    """Return the standard library's docstrings, one document per module, and one document per reference topic.

    A module is the document because most docstrings alone are one or two sentences; a docstring that several modules
    share appears once. `root` is the library's directory, that of the running Python by default.

    Raises:
        DataError: the Python comes without its sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts))
    seen: set[str] = set()
    modules = []
    for number, path in enumerate(paths):
        progress("read the standard library", number, len(paths))
        fresh = [text for text in docstrings_of(path.read_bytes()) if text not in seen]
        seen.update(fresh)
        modules.append("\n\n".join(dict.fromkeys(fresh)))
    progress("read the standard library", len(paths), len(paths))
    modules = [module for module in modules if module]
    if not modules:
        raise DataError(f"the Python standard library in {root} has no sources to read text from; give --input FILE")
    topics = _topics(root / _TOPICS)
    origins = (_origin("docstrings", modules), _origin("language reference", topics))
    return Corpus((*modules, *topics), origins, from_files=False)


def docstrings_of(source: bytes) -> list[str]:
    """Return the docstrings of a module in the order of the text; of one that does not parse, none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []  # the library's own test data holds broken files on purpose
    texts = (ast.get_docstring(node) for node in _documented(tree))
    return [text for text in texts if text and text.strip()]


def _documented(tree: ast.Module) -> Iterator[_Documented]:
    yield tree
    pending: list[ast.AST] = [*reversed(tree.body)]
    while pending:
        node = pending.pop()
        if isinstance(node, _Documented):
            yield node
        # statements only: walking the expressions too takes twenty times as long and finds nothing
        for name in ("finalbody", "orelse", "handlers", "body"):
            pending.extend(child for child in reversed(getattr(node, name, ())) if isinstance(child, ast.AST))


def _topics(path: Path) -> list[str]:
    """Return the texts of pydoc's `topics` dictionary; without the file, none."""
    if not path.is_file():
        return []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    return []


def _origin(name: str, documents: Sequence[str]) -> TextOrigin:
    raw = "\0".join(documents).encode("utf-8", "surrogatepass")
    label = f"{platform.python_implementation()} {platform.python_version()} {name}"
    return TextOrigin(label, len(raw), hashlib.sha256(raw).hexdigest(), name, len(documents))
