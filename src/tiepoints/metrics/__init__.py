"""Metrics as pure functions of keypoints, matches and ground truth; each cites its protocol."""

from .geometry import *  # noqa: F403
from .matching import *  # noqa: F403
from .repeatability import *  # noqa: F403
