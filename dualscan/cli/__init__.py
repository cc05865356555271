"""The command line: `dualscan train | generate | convert | eval | inspect | bench | env | demo`.

Each command is a module with `main(argv) -> int`, imported when it is asked for, so that `dualscan --help` loads
nothing. Errors that a user can mend become one line on stderr. Exit codes: 0 done, 1 a run failed (diverged, disk
full, out of memory), 2 wrong input, 128 + n ended by signal n (130 for Ctrl-C).
"""

import difflib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

# Command -> what it does. The module has the same name, but for `eval`, which would shadow the built-in.
COMMANDS = {
    "demo": "train a small Mamba-2 on the built-in text in three minutes, check it, let it write",
    "train": "train a language model",
    "generate": "continue a text with a trained model",
    "convert": "a checkpoint from one program's format to another's: transformers, mamba_ssm, ours",
    "eval": "bits per byte and perplexity of a model on a file",
    "inspect": "what the layers of a model mix at one text, as a page of pictures",
    "bench": "run benchmarks (in a checkout of the project)",
    "env": "versions, devices, and which implementation each operator takes",
}
_MODULES = {name: f"dualscan.cli.{name}" for name in COMMANDS} | {"eval": "dualscan.cli.evaluate"}

FAILED, USAGE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        from dualscan import __version__

        print(f"dualscan {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"error: unknown command {command!r}{hint} The commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        return USAGE
    try:
        return import_module(_MODULES[command]).main(rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone (`dualscan env | head`). Python would complain again when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        code = exit_code(error)
        if debug or code is None:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return code


def program() -> str:
    """How the user calls this program, for hints that can be copied: its name if the shell finds it, else its path."""
    if shutil.which("dualscan") or Path(sys.argv[0]).stem != "dualscan":
        return "dualscan"
    return sys.argv[0]


def usage() -> str:
    """The text of `dualscan --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dualscan COMMAND [OPTIONS]",
            "",
            "State space models on PyTorch: structured state space duality (SSD), Mamba-2 and hybrids.",
            "",
            "commands:",
            *lines,
            "",
            "`dualscan COMMAND --help` lists a command's options. --debug shows the traceback of an error.",
        ]
    )


def exit_code(error: Exception) -> int | None:
    """The exit code of an error that a user can mend; None for a defect of ours, which deserves its traceback."""
    if isinstance(error, OSError):
        return FAILED if error.errno in (errno.ENOSPC, errno.EIO) else USAGE
    if isinstance(error, ValueError) or type(error) is ImportError:  # a missing extra; ModuleNotFoundError is a defect
        return USAGE
    # The loop's own RuntimeError, and PyTorch's where memory runs out.
    return FAILED if type(error).__name__ in ("TrainingDivergedError", "OutOfMemoryError", "MemoryError") else None


def one_line(error: Exception) -> str:
    """The message of an error, on one line; the system's errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
