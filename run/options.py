"""Options on a script's command line; train.py has settings in their place."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from run.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line complaints and Paths that may begin with ~. `text` is the script's docstring."""

    def __init__(self, text: str | None):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.register("type", Path, lambda path: Path(os.path.expanduser(path)))  # bash leaves --option=~ as it is

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def between(least: int, most: int = 2**63 - 1, kind: type = int) -> Callable[[str], float]:
    """Converts an option's text to a number, for Parser.add_argument(type=…)."""

    def convert(text: str) -> float:
        number = kind(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return number

    return convert
