"""Training of all networks from folders of images."""

from .common import TrainData as TrainData
from .train import train as train
