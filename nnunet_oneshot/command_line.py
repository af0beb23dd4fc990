"""How a command runs and ends: what is printed, as words or as JSON, and with which exit code.

Exit codes: 0 done; 2 bad input or usage, with one sentence; 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from nnunet_oneshot.errors import DISK_FULL, USER_ERRORS, NnunetFailureError

Summary = Mapping[str, Any]
"""What a command ends with: "lines" for people, all else for `-json`."""
Command = Callable[[argparse.Namespace], Summary]

_KEPT = "what is whole is kept"
_BOLD, _RED, _PLAIN = "\033[1m", "\033[31m", "\033[0m"
_AGAIN = "run the same command again"
_INTERRUPTED = f"interrupted; {_AGAIN} to go on from where it stopped"


def execute(parser: argparse.ArgumentParser, command: Command, argv: Sequence[str] | None) -> None:
    """Parse the arguments (those of the process when None), run the command and print its summary."""
    arguments = parser.parse_args(argv)
    try:
        _choose_device(arguments)
        with _only_errors_printed() if arguments.json else contextlib.nullcontext():
            summary = command(arguments)
    except USER_ERRORS as error:
        _refuse(parser, _how_to_go_on(arguments, " ".join(str(error).split())))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _refuse(parser, _how_to_go_on(arguments, _no_space(error)))
    except NnunetFailureError as error:
        parser.exit(
            1, f"{parser.prog}: {_on_terminal(sys.stderr, _RED, 'failed:')} {_how_to_go_on(arguments, str(error))}\n"
        )
    except KeyboardInterrupt:
        parser.exit(1, f"\n{parser.prog}: {_how_to_go_on(arguments, _INTERRUPTED)}\n")
    if arguments.json:
        print(json.dumps({key: value for key, value in summary.items() if key != "lines"}, indent=2))
    else:
        print("\n".join(_shown(summary["lines"])))


def _refuse(parser: argparse.ArgumentParser, sentence: str) -> NoReturn:
    parser.exit(2, f"{parser.prog}: {_on_terminal(sys.stderr, _RED, 'error:')} {sentence}\n")


def _how_to_go_on(arguments: argparse.Namespace, sentence: str) -> str:
    """The sentence, whose advice to run the same command again is amended where --overwrite would begin anew.

    Whether it has begun to replace what was there is not known here.
    """
    if not ("goes_on_without_overwrite" in arguments and arguments.overwrite):
        return sentence
    amended = sentence.replace(_AGAIN, f"{_AGAIN} without --overwrite")
    return amended if amended == sentence else f"{amended} (with it, where the earlier labels are still there)"


def _shown(lines: Sequence[str]) -> list[str]:
    """What comes next stands out."""
    return [_on_terminal(sys.stdout, _BOLD, line) if line.startswith("next:") else line for line in lines]


def _on_terminal(stream: TextIO, style: str, text: str) -> str:
    """Text in a style where somebody looks at a terminal that knows styles; plain in files, pipes and old consoles."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    # Windows Terminal knows styles; the older console shows their codes.
    plain = plain or (os.name == "nt" and "WT_SESSION" not in os.environ)
    return text if plain or not stream.isatty() else f"{style}{text}{_PLAIN}"


def _no_space(error: OSError) -> str:
    where = f" for {error.filename}" if error.filename else ""
    return f"expected free disk space{where}, found none left; free some and {_AGAIN}: {_KEPT}"


@contextlib.contextmanager
def _only_errors_printed() -> Iterator[None]:
    """Standard output goes to standard error, that of workers and libraries too: with -json it is JSON alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def has_gpu() -> bool:
    """Whether this machine has a GPU that commands would choose by themselves."""
    return _best_device() != "cpu"


def _choose_device(arguments: argparse.Namespace) -> None:
    """The best device where nobody named one; `device_typed` tells which it was."""
    arguments.device_typed = getattr(arguments, "device", None) is not None
    if not arguments.device_typed and "device" in arguments:
        arguments.device = _best_device()


def _best_device() -> str:
    torch = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"
