"""Names and defaults of the user interface; imports nothing."""

from __future__ import annotations

DETECTORS = ("keynet", "keynet-light", "keynet-tiny", "rekd", "rekd-light", "sobelnet")
PATCH_DESCRIPTORS = ("hardnet", "hardnet-light", "hardnet-context", "hynet", "sosnet")
DESCRIPTORS = (*PATCH_DESCRIPTORS, "desnet", "rootsift", "none")
#: Defaults.
DETECTOR, DESCRIPTOR = "keynet-light", "hardnet-light"
#: Embedded pipeline of ``lite``.
LITE_GRAPH = "sobelnet+desnet"

#: Sources of keypoint angles; REKD's detectors estimate them themselves.
ORIENTATIONS = ("none", "rekd", "rekd-light", "dominant")
#: Estimators of the affine shapes of patches.
AFFINE_SHAPES = ("none", "affnet")
BACKENDS = ("auto", "torch", "onnxruntime", "openvino")
PRECISIONS = ("auto", "float32", "bfloat16", "int8")
NMS_SHAPES = ("square", "round")
GEOMETRIES = ("homography", "fundamental", "essential")
FORMATS = ("npy", "h5", "colmap")
#: How to choose the pairs of many images to match.
PAIR_METHODS = ("auto", "exhaustive", "sequential", "retrieval", "gps")
#: Compromises between time and completeness of a reconstruction, and COLMAP's mappers.
QUALITIES = ("fast", "default", "best")
MAPPERS = ("incremental", "global")
#: Suffixes of the files with the matches of many pairs: hloc's and COLMAP's.
MATCH_SUFFIXES = (".h5", ".hdf5", ".db")

#: Settings of training pairs (``datasets.synthetic.PRESETS``).
PAIR_PRESETS = (
    *("keynet-paper", "keynet-code", "rekd", "default", "layers", "turns"),
    *("dense", "patches", "dense-upright", "patches-upright", "tilted"),
)

#: Maximum number of keypoints per image.
NUM_KEYPOINTS = 2048
#: The published default of ``extract`` (PyTorch).
EXTRACT_NUM_KEYPOINTS = 5000
#: Number of the nearest matches that may agree with a match, and of those that must by default
#: (``matching.filter_by_neighbors``).
NEIGHBORS, MIN_NEIGHBORS = 24, 2
#: Longest side in pixels of the images that are matched in pairs or stored in a COLMAP database;
#: larger ones are reduced. More detail rarely matches (docs/how-to/speed.md).
MATCH_MAX_SIZE = 1600
#: Number of keypoints in the evaluation protocols of the papers.
EVALUATION_NUM_KEYPOINTS = 1000
#: Descriptor of our detectors in evaluations by these protocols, as in the papers.
EVALUATION_DESCRIPTOR = "hardnet"
#: Version of the ONNX operator set of exported files: the first that can resize maps as needed.
EXPORT_OPSET = 18
#: Number of keypoints of a video frame, limited by the time per frame and by readability.
VIDEO_NUM_KEYPOINTS = 500
