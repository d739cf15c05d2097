"""Detectors of other libraries: positions of drawn dots through each library's own decoding,
shapes, errors. No weights are downloaded.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tiepoints.errors import WeightsError
from tiepoints.evaluation.baselines import external
from tiepoints.evaluation.baselines.external import EXTERNAL_SYSTEMS, external_system, load_rgb
from tiepoints.evaluation.systems import system

DOTS = ((45, 40, 1.0), (100, 52, 0.8), (60, 90, 0.6), (121, 83, 0.4))  # x, y, brightness


def dots(size=(160, 128), ratio=1.0) -> torch.Tensor:
    """Gaussian dots at ``DOTS`` of an image ``ratio`` times as large as the input of the network,
    on black: (1,1,h,w).
    """
    y, x = torch.meshgrid(torch.arange(size[1]) * 1.0, torch.arange(size[0]) * 1.0, indexing="ij")
    image = torch.zeros(size[1], size[0])
    for cx, cy, level in DOTS:
        image += level * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (1.5 * ratio) ** 2))
    return image.clamp(0, 1)[None, None]


class Brightness(nn.Module):
    """Replaces a trained network: its score is the brightness of the image, its descriptors are
    constant.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, image):
        gray = image.mean(dim=1, keepdim=True)
        return torch.cat(
            [torch.ones_like(gray).expand(-1, self.channels, -1, -1), gray - 0.05], dim=1
        )


def disk(kornia):
    return kornia.DISK(desc_dim=128, unet=Brightness(128))


def aliked(kornia):
    net = kornia.ALIKED("aliked-t16", max_num_keypoints=100, detection_threshold=0.1)
    net.extract_dense_map = lambda image: (torch.ones(1, 64, *image.shape[-2:]), image[:, :1])
    return net


def dedode(kornia):
    net = kornia.DeDoDe.__new__(kornia.DeDoDe)  # its two networks are slow to create
    nn.Module.__init__(net)
    net.normalizer = nn.Identity()

    def peaks(
        image,
    ):  # DeDoDe has no non-maximum suppression, so a dot must be one pixel
        gray = image[:, :1]
        return (gray * (gray == nn.functional.max_pool2d(gray, 9, 1, 4)) + 1e-6).log()

    net.detector = nn.Identity()
    net.detector.forward = peaks
    net.descriptor = nn.Identity()
    net.descriptor.forward = lambda image: 7 * torch.ones(1, 256, *image.shape[-2:])
    return net


def xfeat(kornia):
    net = kornia.XFeat(detection_threshold=1e-5)

    def forward(image):
        cells = nn.functional.pixel_unshuffle(image[:, :1], 8)
        # so small relative to "no keypoint" that the probability is the brightness, not a
        # fraction of the cell's
        logits = torch.cat([(1e-3 * cells + 1e-9).log(), torch.zeros_like(cells[:, :1])], dim=1)
        h, w = cells.shape[-2:]
        return torch.ones(1, 64, h, w), logits, torch.ones(1, 1, h, w)

    net.net.forward = forward
    return net


def kornia_keynet_hardnet(kornia):
    detector = kornia.KeyNetDetector(False, num_features=40)
    detector.model = nn.Identity()
    return kornia.LocalFeature(detector, kornia.LAFDescriptor(kornia.HardNet(False)))


def superpoint(transformers):
    net = transformers.SuperPointForKeypointDetection(transformers.SuperPointConfig())
    decoder = net.keypoint_decoder
    with torch.no_grad():  # pixels are unchanged by both layers
        for layer, middle in ((decoder.conv_score_a, 1), (decoder.conv_score_b, 0)):
            layer.weight.zero_()
            layer.bias.zero_()
            index = torch.arange(64)
            layer.weight[index, index, middle, middle] = 8 if middle == 0 else 1
        decoder.conv_score_b.bias[64] = 6
    net.encoder.forward = lambda image, **_: (
        torch.cat(
            [
                nn.functional.pixel_unshuffle(image, 8),
                torch.ones(1, 64, image.shape[2] // 8, image.shape[3] // 8),
            ],
            dim=1,
        ),
    )
    return net


LIBRARY = {"superpoint": "transformers"}
MAKERS = {
    f.__name__.replace("_", "-"): f
    for f in (disk, aliked, dedode, xfeat, kornia_keynet_hardnet, superpoint)
}
MAKERS["kornia-keynet-affnet-hardnet"] = kornia_keynet_hardnet
LENGTHS = {"disk": 128, "aliked": 64, "dedode": 256, "xfeat": 64, "superpoint": 256}


def built(name: str) -> nn.Module:
    if name in LIBRARY:
        return MAKERS[name](pytest.importorskip("transformers"))
    library = pytest.importorskip("kornia.feature")
    if name in ("aliked", "xfeat") and not hasattr(
        library, name.upper() if name == "aliked" else "XFeat"
    ):
        pytest.skip(f"this kornia has no {name}")
    torch.manual_seed(0)
    return MAKERS[name](library)


def offsets(found) -> torch.Tensor:
    """Displacement from each dot to the nearest keypoint."""
    truth = torch.tensor([d[:2] for d in DOTS], dtype=torch.float32)
    return found.xy[torch.cdist(truth, found.xy).argmin(dim=1)] - truth


@pytest.mark.parametrize("name", EXTERNAL_SYSTEMS)
def test_dots_are_detected_at_their_positions(name):
    found = external_system(name, model=built(name), num_keypoints=200)(dots())
    assert found.image_size == (160, 128)
    assert offsets(found).abs().max() < 0.3, offsets(found)
    assert (found.score.diff() <= 0).all()
    assert found.xy.dtype == found.descriptors.dtype == torch.float32
    assert found.descriptors.shape == (len(found), LENGTHS.get(name, 128))
    assert torch.allclose(found.descriptors.norm(dim=1), torch.ones(len(found)), atol=1e-4)
    # the strongest of all keypoints first
    few = external_system(name, model=built(name), num_keypoints=2)(dots())
    assert len(few) == 2
    if "keynet" not in name:
        assert (few.xy - torch.tensor([d[:2] for d in DOTS[:2]])).abs().max() < 0.3


@pytest.mark.parametrize("name", [n for n in EXTERNAL_SYSTEMS if "keynet" not in n])
def test_sizes_that_are_not_multiples_of_cells(name):
    found = external_system(name, model=built(name), num_keypoints=100)(dots((175, 133)))
    # XFeat resizes the image to 160 x 128, so that integer pixels are up to half a pixel away
    assert offsets(found).abs().max() < (0.7 if name == "xfeat" else 0.3), offsets(found)
    assert (found.xy >= -0.5).all()
    assert (found.xy <= torch.tensor([174.5, 132.5])).all()


def test_xfeat_has_no_bias_on_an_image_it_resizes():
    """Its own positions are (ratio - 1) / 2 too small, here 0.24 px, as a mirrored image shows."""
    find = external_system("xfeat", model=built("xfeat"), num_keypoints=100)
    image = dots((160, 95))  # 95 rows become 64
    original, mirrored = find(image).xy, find(image.flip(-2)).xy
    mirrored[:, 1] = 94 - mirrored[:, 1]
    distance, index = torch.cdist(original, mirrored).min(dim=1)
    assert (distance < 2).sum() >= 3
    assert abs(float((original - mirrored[index])[distance < 2, 1].mean())) < 0.05


def test_keynet_levels_have_the_half_pixel_offset_of_resizing():
    """A wide dot is detected at coarse levels, whose half-pixel offset kornia omits."""
    found = external_system(
        "kornia-keynet-hardnet", model=built("kornia-keynet-hardnet"), num_keypoints=200
    )(dots(ratio=2.0))
    near = torch.cdist(found.xy, torch.tensor([DOTS[0][:2]], dtype=torch.float32))[:, 0] < 4
    assert found.scale[near].unique().numel() >= 3
    assert 0.4 < float(found.scale.min()) < 1 < float(found.scale.max())
    assert (found.xy[near] - torch.tensor(DOTS[0][:2])).abs().mean() < 0.3


@pytest.mark.parametrize("name", EXTERNAL_SYSTEMS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 20), (33, 40)])
def test_tiny_and_constant_images(name, shape):
    detect = external_system(name, model=built(name), num_keypoints=10)
    for image in (
        torch.zeros(1, 1, *shape),
        torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)),
    ):
        found = detect(image)
        assert len(found) <= 10
        assert found.descriptors.shape == (len(found), LENGTHS.get(name, 128))
        assert ((found.xy >= -0.5) & (found.xy <= torch.tensor([shape[1], shape[0]]) - 0.5)).all()


@pytest.mark.parametrize("name", ["disk", "aliked", "xfeat", "superpoint"])
def test_real_networks_with_random_weights(name):
    library = pytest.importorskip(LIBRARY.get(name, "kornia.feature"))
    torch.manual_seed(0)
    makers = {
        "disk": lambda: library.DISK(),
        "aliked": lambda: library.ALIKED("aliked-t16", max_num_keypoints=50, detection_threshold=0),
        "xfeat": lambda: library.XFeat(detection_threshold=0.0),
        "superpoint": lambda: library.SuperPointForKeypointDetection(library.SuperPointConfig()),
    }
    if name in ("aliked", "xfeat") and not hasattr(library, "XFeat"):
        pytest.skip("this kornia has neither ALIKED nor XFeat")
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    found = external_system(name, model=makers[name](), num_keypoints=20)(image)
    assert len(found) == 20
    assert torch.isfinite(found.descriptors).all()
    assert (found.scale == 1).all()


def test_color_is_passed_to_the_networks(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    expected = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    Image.fromarray(image).save(tmp_path / "a.png")
    alpha = np.concatenate([image, image[..., :1]], axis=-1)
    for source in (image, alpha, tmp_path / "a.png", Image.fromarray(image), expected, expected[0]):
        assert torch.allclose(load_rgb(source), expected)
    Image.fromarray(image[..., 0]).save(tmp_path / "b.png")
    for source in (image[..., 0], tmp_path / "b.png", expected[:, :1]):
        assert torch.allclose(load_rgb(source), expected[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="image"):
        load_rgb(torch.zeros(2, 3, 5, 6))
    with pytest.raises(FileNotFoundError):
        load_rgb(tmp_path / "c.png")


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"disk.*got 'nonsense'"):
        external_system("nonsense")
    with pytest.raises(ValueError, match="num_keypoints"):
        external_system("disk", num_keypoints=0)


@pytest.mark.parametrize("name", EXTERNAL_SYSTEMS)
def test_missing_and_old_libraries_name_the_install_command(name, monkeypatch):
    library = LIBRARY.get(name, "kornia")
    module = external.LIBRARIES[library][0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{name} needs {library}: pip install"):
        system(name)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace())
    with pytest.raises(ImportError, match=f"{name} needs a newer {library}"):
        external_system(name)


def test_failed_download_of_weights_raises(monkeypatch):
    def offline(_):
        raise RuntimeError("no route to host")

    monkeypatch.setitem(
        sys.modules,
        "kornia.feature",
        SimpleNamespace(DISK=SimpleNamespace(from_pretrained=offline)),
    )
    with pytest.raises(WeightsError, match=r"kornia.*weights of disk.*network.*no route"):
        external_system("disk")
