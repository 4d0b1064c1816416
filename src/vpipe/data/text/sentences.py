"""A document into sentences, by punctuation: English and other spaced scripts, Chinese and Japanese."""

from __future__ import annotations

import re

__all__ = ["split_sentences"]

# A Latin end needs a space and then something that is no small letter; a Chinese end needs nothing after it.
_END = re.compile(
    r"""(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)[.!?]+["'”’»)\]]*(?=\s+[^\sa-z])"""  # noqa: RUF001
    r"""|[。！？｡]+[」』”’）》】"']*"""  # noqa: RUF001
)
_NEW_BLOCK = re.compile(r"\s*(?:[-*+•]|\d+[.)]|>>>)\s")  # list items and examples start anew
_WORD = re.compile(r"[^\W_]")


def split_sentences(document: str) -> list[str]:
    """Return the sentences of a document in order, white space made single.

    A blank line, a line without letters or digits (a rule) and a list item end a sentence too. Pieces without a letter
    or digit are left out.
    """
    return [sentence for block in _blocks(document) for sentence in _cut(block)]


def _blocks(document: str) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in document.split("\n"):
        if not _WORD.search(line):
            blocks.append([])
        elif _NEW_BLOCK.match(line):
            blocks.append([line])
        else:
            blocks[-1].append(line)
    return [" ".join(" ".join(lines).split()) for lines in blocks if lines]


def _cut(block: str) -> list[str]:
    ends = [match.end() for match in _END.finditer(block)]
    pieces = (block[start:stop].strip() for start, stop in zip([0, *ends], [*ends, len(block)], strict=True))
    return [piece for piece in pieces if _WORD.search(piece)]
