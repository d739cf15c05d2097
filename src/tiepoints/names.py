"""Every name and default that a user may type; imports nothing."""

from __future__ import annotations

DETECTORS = ("keynet", "keynet-tiny", "rekd", "rekd-light", "sobelnet")
PATCH_DESCRIPTORS = ("hardnet", "hynet", "sosnet")
DESCRIPTORS = (*PATCH_DESCRIPTORS, "desnet", "rootsift", "none")
#: What is used if nothing is chosen.
DETECTOR, DESCRIPTOR = "keynet", "hardnet"

#: Where the angle of a keypoint comes from; REKD's detectors measure it themselves.
ORIENTATIONS = ("none", "rekd", "rekd-light", "dominant")
PRECISIONS = ("auto", "float32", "bfloat16")
NMS_SHAPES = ("square", "round")
GEOMETRIES = ("homography", "fundamental", "essential")
FORMATS = ("npy", "h5", "colmap")

#: Maximum number of keypoints per image.
NUM_KEYPOINTS = 2048
#: The published default of ``extract`` (spec 2.1, PyTorch).
EXTRACT_NUM_KEYPOINTS = 5000
#: Keypoints compared by the evaluation protocols of the papers.
EVALUATION_NUM_KEYPOINTS = 1000
#: Keypoints of a video frame: more do not fit the time of a frame, or into the picture.
VIDEO_NUM_KEYPOINTS = 500
