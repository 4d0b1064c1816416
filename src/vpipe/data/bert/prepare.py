"""Text into a BERT pre-training set: tokenizer, sentence pairs, masks, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from vpipe.data.bert.existing import refuse_existing
from vpipe.data.bert.meta import META_FILE, BertMeta, BertOptions, Split, SplitMeta, fingerprint
from vpipe.data.bert.split_writer import SplitWriter
from vpipe.data.draws import Stream
from vpipe.data.order import shuffled
from vpipe.data.progress import Progress, no_progress
from vpipe.data.store import atomic_directory, check_destination, describe_file
from vpipe.data.text.corpus import Corpus, DocumentRule, read_files, split_documents, without_duplicates
from vpipe.data.text.sentences import split_sentences
from vpipe.data.text.stdlib import stdlib_corpus
from vpipe.data.text.wordpiece import save_tokenizer, train_wordpiece
from vpipe.errors import DataError

__all__ = ["prepare_bert"]

MIN_DOCUMENTS = 2  # a random next sentence comes from another document of the same split

_Document = list[str]  # its sentences


def prepare_bert(
    inputs: Sequence[str | Path],
    out: str | Path,
    options: BertOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> BertMeta:
    """Prepare a training set from text files, or without any from the text that comes with Python.

    Equal text and options give equal arrays, and equal bytes where the text is in the same files. Documents are dealt
    to the splits whole; the tokenizer learns from the training documents only. `out` appears when everything is in it.
    Text is held in memory.

    Raises:
        ConfigError: an option is out of range.
        DataError: the text is missing, unreadable or too little, or `out` cannot be written.
    """
    options, out = options or BertOptions(), Path(out)
    paths = [Path(path) for path in inputs]
    if not force:
        refuse_existing(out, paths, options)
    check_destination(out, force, META_FILE)
    corpus = read_files(paths, options.documents, progress) if paths else stdlib_corpus(progress)
    unique = without_duplicates(corpus.documents)
    documents = _sentences(unique, progress)
    _refuse_few(unique, len(documents), options)
    splits = _deal(documents, options)
    progress("train the tokenizer", 0, 0)
    tokenizer = train_wordpiece(
        [" ".join(document) for document in splits["train"]],
        vocab_size=options.vocab_size,
        limit_alphabet=options.limit_alphabet,
        lowercase=options.lowercase,
    )
    with atomic_directory(out, force=force, marker=META_FILE) as staging:
        writer = SplitWriter(staging, tokenizer, options, progress)
        written = {split: writer.write(split, documents) for split, documents in splits.items()}
        meta = _describe(staging, tokenizer, options, corpus, len(corpus.documents) - len(unique), written)
        (staging / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return meta


def _sentences(documents: Sequence[str], progress: Progress) -> list[_Document]:
    found = []
    for number, document in enumerate(documents):
        if number % 1000 == 0:
            progress("find sentences", number, len(documents))
        found.append(split_sentences(document))
    progress("find sentences", len(documents), len(documents))
    return [document for document in found if document]


def _refuse_few(texts: Sequence[str], num_documents: int, options: BertOptions) -> None:
    """Raise DataError for too few documents, with what would make enough of this very text."""
    smallest = MIN_DOCUMENTS * (2 if options.eval_fraction else 1)
    if num_documents >= smallest:
        return
    rules: tuple[DocumentRule, ...] = ("two-blank-lines", "blank-line", "line")
    ways = [f"--documents {rule}" for rule in rules if _count(texts, rule) >= smallest]
    if options.eval_fraction and num_documents >= MIN_DOCUMENTS:
        ways.append("--eval-fraction 0")
    raise DataError(
        f"the text has {num_documents} different documents with words, at least {smallest} are needed (random next "
        f"sentences come from another document of the same split); give more text"
        + (f", or use {' or '.join(ways)}" if ways else "")
    )


def _count(texts: Sequence[str], rule: DocumentRule) -> int:
    """Count the documents that a finer rule makes of these."""
    pieces = [piece for text in texts for piece in split_documents(text, rule)[1]]
    return sum(bool(split_sentences(piece)) for piece in without_duplicates(pieces))


def _deal(documents: list[_Document], options: BertOptions) -> dict[Split, list[_Document]]:
    """Deal whole documents to the splits, each in the order of the text."""
    if not options.eval_fraction:
        return {"train": documents}
    wanted = round(options.eval_fraction * len(documents))
    num_eval = min(max(wanted, MIN_DOCUMENTS), len(documents) - MIN_DOCUMENTS)
    chosen = set(shuffled(options.seed, Stream.SPLIT, len(documents))[:num_eval].tolist())
    return {
        "train": [document for number, document in enumerate(documents) if number not in chosen],
        "eval": [document for number, document in enumerate(documents) if number in chosen],
    }


def _describe(
    staging: Path,
    tokenizer: Tokenizer,
    options: BertOptions,
    corpus: Corpus,
    num_duplicates: int,
    splits: dict[Split, SplitMeta],
) -> BertMeta:
    saved = tuple(describe_file(path, staging) for path in save_tokenizer(tokenizer, staging))
    arrays = [stored for split in splits.values() for stored in split.arrays.values()]
    return BertMeta(
        fingerprint=fingerprint([*saved, *arrays]),
        vocab_size=tokenizer.get_vocab_size(),
        options=options,
        origins=corpus.origins,
        from_files=corpus.from_files,
        num_duplicates=num_duplicates,
        tokenizer=saved,
        splits=splits,
    )
