"""Command line interface, with one module per group of commands."""

from .main import app as app
from .main import main as main
