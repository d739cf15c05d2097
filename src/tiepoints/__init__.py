"""Find, describe, match and measure tie points, and train the small networks that do so.

The public names load on first use, so that ``import tiepoints`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "DataError": "errors",
    "Estimate": "structs",
    "ExtractSettings": "extract",
    "Extractor": "extract",
    "Features": "structs",
    "KeyNet": "detectors.keynet",
    "Keypoints": "structs",
    "Matches": "structs",
    "WeightsError": "errors",
    "build": "extract",
    "estimate": "estimation",
    "load": "weights",
    "match": "matching",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .detectors.keynet import KeyNet as KeyNet
    from .errors import DataError as DataError
    from .errors import WeightsError as WeightsError
    from .estimation import estimate as estimate
    from .extract import Extractor as Extractor
    from .extract import ExtractSettings as ExtractSettings
    from .extract import build as build
    from .matching import match as match
    from .structs import Estimate as Estimate
    from .structs import Features as Features
    from .structs import Keypoints as Keypoints
    from .structs import Matches as Matches
    from .weights import load as load


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tiepoints' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
