"""Exceptions of the package and their messages; other errors at its API boundary are ValueError,
FileNotFoundError or ImportError.
"""


def first_line(error: BaseException) -> str:
    """First line of a message, as those of some libraries are long; the type if there is none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class DataError(Exception):
    """Images or other input data that cannot be used; the message names the file and the remedy."""


class WeightsError(Exception):
    """A weights file that is missing, damaged, or of another network; the message says what was
    expected.
    """
