"""The two exceptions of this package; everything else is a ValueError, FileNotFoundError or
ImportError at the door.
"""


class DataError(Exception):
    """Images or other input data that cannot be used; the message names the file and the remedy."""


class WeightsError(Exception):
    """A weights file that is missing, damaged, or made for another network; the message says what
    was expected.
    """
