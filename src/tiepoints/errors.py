"""Exceptions of the package; other errors at its API boundary are ValueError, FileNotFoundError or
ImportError.
"""


class DataError(Exception):
    """Images or other input data that cannot be used; the message names the file and the remedy."""


class WeightsError(Exception):
    """A weights file that is missing, damaged, or of another network; the message says what was
    expected.
    """
