"""``python -m tiepoints``."""

from .cli import main

if __name__ == "__main__":
    main()
