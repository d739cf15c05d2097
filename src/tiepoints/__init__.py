"""Detect, describe, match and evaluate tie points, and train the small networks that do so.

Public names are imported on first use, which keeps ``import tiepoints`` fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

#: Public name -> module that defines it.
_EXPORTS = {
    "DataError": "errors",
    "Estimate": "structs",
    "ExtractOptions": "extract",
    "Extractor": "extract",
    "Features": "structs",
    "KeyNet": "models.keynet",
    "Keypoints": "structs",
    "MatchOptions": "jobs.match",
    "Matches": "structs",
    "WeightsError": "errors",
    "build": "extract",
    "draw_keypoints": "plot",
    "draw_matches": "plot",
    "estimate": "estimation",
    "from_pretrained": "pretrained",
    "load": "weights",
    "match": "matching",
    "match_two": "jobs.match",
    "reconstruct": "jobs.reconstruct",
    "train": "training.recipes",
}
__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from .errors import DataError as DataError
    from .errors import WeightsError as WeightsError
    from .estimation import estimate as estimate
    from .extract import ExtractOptions as ExtractOptions
    from .extract import Extractor as Extractor
    from .extract import build as build
    from .jobs.match import MatchOptions as MatchOptions
    from .jobs.match import match_two as match_two
    from .jobs.reconstruct import reconstruct as reconstruct
    from .matching import match as match
    from .models.keynet import KeyNet as KeyNet
    from .plot import draw_keypoints as draw_keypoints
    from .plot import draw_matches as draw_matches
    from .pretrained import from_pretrained as from_pretrained
    from .structs import Estimate as Estimate
    from .structs import Features as Features
    from .structs import Keypoints as Keypoints
    from .structs import Matches as Matches
    from .training.recipes import train as train
    from .weights import load as load


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("tiepoints")
    if name not in _EXPORTS:
        raise AttributeError(
            f"module 'tiepoints' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
