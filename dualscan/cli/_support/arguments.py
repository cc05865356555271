"""Typed arguments through tyro, with validation errors as one line like all others."""

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], argv: Sequence[str], *, prog: str, **options: Any) -> Arguments:
    """Reads arguments into a dataclass.

    Args:
        kind: a dataclass; its fields are the options, its docstring their help.
        argv: the arguments.
        prog: the command, for the help text.
        **options: for `tyro.cli`, such as `default` and `description`.

    Raises:
        ValueError: the dataclass refused the values; its own message.
        SystemExit: after printing help (0), or a box about unknown or missing options (2).
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(argv), prog=prog, **options)
    except SystemExit as end:
        text = printed.getvalue()
        if end.code and "Value error" in text:
            raise ValueError(_message(text)) from None
        sys.stderr.write(text)
        raise


def _message(box: str) -> str:
    """The sentence inside tyro's box: `│ Error parsing model: d_model=0 must be ... │`."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line and "full helptext" not in line)
    return text.partition(": ")[2] if text.startswith("Error parsing") else text


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The value given for `flag`, as `--flag value` or `--flag=value`; needed where defaults depend on it."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else next(iter(argv[index + 1 : index + 2]), None)
    return None


class _AboveBars(logging.Handler):
    """Prints log messages without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_progress_messages() -> None:
    """Lets the package's informative messages through to stderr."""
    logger = logging.getLogger("dualscan")
    if not logger.handlers:
        logger.addHandler(_AboveBars())
    logger.setLevel(logging.INFO)
