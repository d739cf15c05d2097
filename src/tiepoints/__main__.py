"""``python -m tiepoints``."""

from .cli import main

main()
