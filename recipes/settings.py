"""How a script reads its settings, reports a user's mistake, and listens for a signal."""

import difflib
import json
import os
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, typing

if TYPE_CHECKING:  # the restricted types are made at run time, where no type checker sees them
    PositiveInt = int
    NonNegativeInt = int
    Count = int
    PositiveFloat = float
    NonNegativeFloat = float
    ClosedUnitInterval = float
    Share = float
else:
    PositiveInt, NonNegativeInt = typing.PositiveInt, typing.NonNegativeInt
    NonNegativeFloat, ClosedUnitInterval = typing.NonNegativeFloat, typing.ClosedUnitInterval
    Count = typing.restricted_number_type("Count", int, (">=", 2))
    PositiveFloat = typing.restricted_number_type("FinitePositiveFloat", float, [(">", 0), ("<", float("inf"))])
    Share = typing.restricted_number_type("Share", float, [(">=", 0), ("<", 1)])


class RecipeError(ValueError):
    """A user's mistake in the settings or the files that they name: one line, no traceback."""


def setting(default: Any = MISSING, help: str = "") -> Any:
    """Declare a dataclass field with the text that --help prints for it; without a default it is required."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def make_parser(settings: type, description: str | None = None) -> ArgumentParser:
    """Return a parser with --config FILE and --name VALUE for every field of a dataclass; the later one wins."""
    # abbreviations off: --epoch must be an unknown option, not --epochs
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file of settings, e.g. recipes/configs/digits.yaml")
    types = get_type_hints(settings)
    for item in fields(settings):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        given = {"required": True} if default is MISSING else {"default": default}
        words = item.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{item.name}", type=types[item.name], help=words, **given)
    return parser


def parse(settings: type, arguments: list[str] | None = None, description: str | None = None) -> Any:
    """Return the dataclass filled from a command line (default: this process's).

    Raises:
        RecipeError: an option is unknown or missing, a value has the wrong type or range, the file is unreadable.
    """
    try:
        values = make_parser(settings, description).parse_args(arguments).as_dict()
    except ArgumentError as error:
        message = " ".join(str(error).split())
        unknown = next((word for word in message.split() if word.startswith(("--", "'"))), "").strip("-'")
        hint = suggest(unknown, [item.name for item in fields(settings)]) if unknown.isidentifier() else ""
        raise RecipeError(f"{message}{'; ' + hint if hint else ''}") from error
    values.pop("config")
    return settings(**json.loads(json.dumps(values)))  # plain numbers: a pickle of a restricted type cannot be read


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the known names that resemble a name, or an empty string."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def exit_with(error: Exception) -> NoReturn:
    """Print a mistake as one line on stderr, once for all processes, and exit with status 2."""
    rank = int(os.environ.get("RANK", "0"))
    # an error in a loader's worker arrives with the worker's traceback in front of it
    message = " ".join(str(error).rpartition("RecipeError: ")[2].split())
    if rank != 0:
        # Every process meets the same mistake and the main one reports it; the launcher then ends the others here.
        # One that outlives this wait met a mistake that the main process did not.
        time.sleep(10)
        message = f"(process {rank}) {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextmanager
def listen_for_signals() -> Iterator[Callable[[], bool]]:
    """Take SIGINT and SIGTERM as a request to stop; yields a function that says whether one came.

    A second SIGINT ends the process at once.
    """
    received: list[int] = []

    def take(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
