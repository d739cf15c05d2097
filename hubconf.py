"""Entry points of ``torch.hub``, which need no installation of the package:

    extractor = torch.hub.load("OWNER/REPOSITORY", "extractor", "keynet-hardnet")
    features = extractor.extract("photo.jpg")

With a local copy: ``torch.hub.load("path/to/copy", "extractor", source="local")``.
"""

import sys as _sys
from pathlib import Path as _Path

dependencies = ["numpy", "PIL", "poselib", "safetensors", "torch", "tqdm"]

if "tiepoints" not in _sys.modules:
    _sys.path.insert(0, str(_Path(__file__).resolve().parent / "src"))


def extractor(source="keynet-hardnet", **options):
    """``tiepoints.from_pretrained``: detector and descriptor of keypoints, as an extractor."""
    import tiepoints

    return tiepoints.from_pretrained(source, **options)


def network(name="keynet"):
    """``tiepoints.load``: a network alone, such as keynet, sobelnet, hardnet or desnet."""
    import tiepoints

    return tiepoints.load(name)
