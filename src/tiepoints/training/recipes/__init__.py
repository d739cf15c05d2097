"""Training of every network from folders of images: ``train``."""

from .common import TrainData as TrainData
from .train import train as train
