"""`vpipe data prepare bert`: make a training set from text."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from vpipe.cli.progress import show_progress
from vpipe.config.text import format_yaml

if TYPE_CHECKING:
    from vpipe.data.bert.meta import BertMeta

__all__ = ["command"]


@click.group(name="data")
def command() -> None:
    """Prepare training sets from text."""


@command.group()
def prepare() -> None:
    """Turn text into memory-mapped training arrays."""


@prepare.command(epilog="Equal text, options and seed give equal arrays.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text file, repeatable. Without it: the docstrings and the language reference of the running Python, "
    "2.7 MB of English that need no download.",
)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--documents",
    type=click.Choice(["auto", "two-blank-lines", "blank-line", "line", "file"]),
    default="auto",
    show_default=True,
    help="What ends a document in the input. auto: two blank lines in a row where the file has any, else a blank line "
    "where it has any, else the line.",
)
@click.option("--vocab-size", default=8192, show_default=True, help="Tokens at most; BERT itself has 30522.")
@click.option("--sequence-length", default=128, show_default=True, help="Tokens per sample.")
@click.option(
    "--masking",
    type=click.Choice(["static", "dynamic"]),
    default="static",
    show_default=True,
    help="Hide 15 % of the tokens once and for all, or anew in every epoch.",
)
@click.option(
    "--eval-fraction", default=0.1, show_default=True, help="Share of the documents kept for evaluation; 0 for none."
)
@click.option("--seed", default=0, show_default=True, help="Decides splits, pairs and masks.")
@click.option("--limit-samples", type=int, default=None, help="Samples at most, in each split.  [default: all]")
@click.option("--passes", "num_passes", default=1, show_default=True, help="Times to go over the text, paired anew.")
@click.option("--limit-alphabet", default=9000, show_default=True, help="Different characters at most.")
@click.option("--cased", is_flag=True, help="Keep capitals and accents.")
@click.option("--force", is_flag=True, help="Replace a set that is already in DIR.")
def bert(inputs: tuple[Path, ...], out: Path, cased: bool, force: bool, **options: int | float | str | None) -> None:
    """Make a BERT pre-training set: masked words and next sentences.

    Trains a WordPiece tokenizer, pairs sentences (half of the second ones random), masks 15 % of the tokens and writes
    DIR with train/, eval/, tokenizer.json, vocab.txt and meta.json. Whole documents go to one of the two splits.
    """
    from vpipe.data.bert.meta import BertOptions
    from vpipe.data.bert.prepare import prepare_bert

    start = time.monotonic()
    chosen = BertOptions(lowercase=not cased, **options)  # type: ignore[arg-type]
    with _leaving_nothing_behind(), show_progress() as progress:
        meta = prepare_bert(inputs, out, chosen, force=force, progress=progress)
    click.echo("\n".join(_summary(meta, out, time.monotonic() - start)))


@contextmanager
def _leaving_nothing_behind() -> Iterator[None]:
    """Let signals that ask a process to end do so as Ctrl-C does, by way of all that tidies up."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    click.echo(f"ended by signal {number} ({signal.Signals(number).name})", err=True)
    sys.exit(128 + number)


def _summary(meta: BertMeta, out: Path, seconds: float) -> list[str]:
    splits = meta.splits
    length = meta.options.sequence_length
    size = sum(stored.num_bytes for stored in meta.files())
    duplicates = f"; duplicates left out: {meta.num_duplicates:,}" if meta.num_duplicates else ""
    padding = {name: 1 - split.num_tokens / (split.num_samples * length) for name, split in splits.items()}
    return [
        f"prepared {out} in {seconds:.1f} s",
        *(
            f"  text        {origin.name}: {origin.num_bytes / 1e6:.1f} MB, {origin.num_documents:,} documents "
            f"({origin.rule})"
            for origin in meta.origins
        ),
        f"  documents   {_per_split(meta, 'num_documents')}{duplicates}",
        f"  samples     {_per_split(meta, 'num_samples')}; {length} tokens each, {padding['train']:.0%} padding, "
        f"{meta.options.masking} masking",
        f"  vocabulary  {meta.vocab_size:,} tokens; unknown in "
        + ", ".join(f"{name} {split.unknown_share:.2%}" for name, split in splits.items()),
        f"  size        {size / 1e6:.1f} MB",
        "",
        "use it in a run's YAML:",
        *(f"  {line}" for line in format_yaml({"data": _section(meta, out)}).splitlines()),
    ]


def _section(meta: BertMeta, out: Path) -> dict[str, str | int]:
    """Return the YAML section of a run on this set; its path is absolute, as a relative one starts from that file."""
    options = meta.options
    section: dict[str, str | int] = {"type": "bert", "data_dir": str(out.absolute())}
    section["sequence_length"] = options.sequence_length
    return section | ({"masking": options.masking} if options.masking != "static" else {})


def _per_split(meta: BertMeta, count: str) -> str:
    return ", ".join(f"{getattr(split, count):,} {name}" for name, split in meta.splits.items())
