"""Extractors from names, files, folders and repositories; ``torch.hub``; model cards."""

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import tiepoints
from helpers import call, texture
from tiepoints import pretrained
from tiepoints.errors import WeightsError
from tiepoints.names import DESCRIPTORS, DETECTORS
from tiepoints.weights import DATA, table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    """A folder with a detector and a descriptor, as in a repository."""
    for name in ("sobelnet", "desnet"):
        shutil.copy(DATA / f"{name}.safetensors", tmp_path / f"my-{name}.safetensors")
    return tmp_path


def options_of(*arguments, **options) -> tuple[object, object]:
    built = tiepoints.from_pretrained(*arguments, **options, device="cpu").options
    return built.detector, built.descriptor


def test_every_combination_of_embedded_names_is_found():
    for detector in DETECTORS:
        assert options_of(detector, descriptor="none") == (detector, "none")
        assert options_of(f"{detector}-desnet") == (detector, "desnet")
        assert options_of(f"{detector}+desnet") == (detector, "desnet")
    for descriptor in DESCRIPTORS[:-1]:
        assert options_of(descriptor) == ("keynet-light", descriptor)
        assert options_of(f"keynet-light-{descriptor}") == ("keynet-light", descriptor)
        assert options_of(f"keynet-tiny-{descriptor}") == ("keynet-tiny", descriptor)


def test_features_are_those_of_build(folder):
    image = texture(0, (200, 150))
    expected = tiepoints.build("sobelnet", "desnet", num_keypoints=50, device="cpu").extract(image)
    for source in ("sobelnet-desnet", folder, str(folder)):
        extractor = tiepoints.from_pretrained(source, num_keypoints=50, device="cpu")
        found = extractor.extract(image)
        assert len(found) > 20
        assert torch.equal(found.xy, expected.xy)
        assert torch.equal(found.descriptors, expected.descriptors)


def test_files_and_folders_have_the_roles_of_their_networks(folder):
    detector, descriptor = (
        str(folder / f"my-{name}.safetensors") for name in ("sobelnet", "desnet")
    )
    assert options_of(detector) == (detector, "hardnet-light")
    assert options_of(detector, descriptor="none") == (detector, "none")
    assert options_of(Path(descriptor), detector="sobelnet") == ("sobelnet", descriptor)
    assert options_of(folder) == (detector, descriptor)


@pytest.mark.parametrize("name", ["optimizer", "optimiser"])
def test_cards_have_the_optimizer(name):
    rows = pretrained._training({"schedule": {name: "adam", "seed": 3, "clip": 1.0}})
    assert rows == {"optimizer": "adam", "seed": 3}


def test_sources_that_cannot_be_used(folder, tmp_path):
    def fails(*arguments, **options) -> str:
        with pytest.raises((ValueError, WeightsError)) as caught:
            tiepoints.from_pretrained(*arguments, **options)
        return str(caught.value)

    for name in ("keynet-nothing", "none", "keynet-none", "no file.safetensors", "", "a/b/c"):
        assert "such as keynet-hardnet" in fails(name)
    assert "omit descriptor='desnet'" in fails("keynet-hardnet", descriptor="desnet")
    shutil.copy(DATA / "keynet.safetensors", folder)
    assert "several detectors, keynet.safetensors and my-sobelnet" in fails(folder)
    (tmp_path / "empty").mkdir()
    assert "no .safetensors file" in fails(tmp_path / "empty")
    (tmp_path / "empty" / "a.safetensors").write_bytes(b"nonsense")
    assert "a.safetensors is no readable" in fails(tmp_path / "empty")
    with pytest.raises(TypeError, match="num_keypoints"):
        tiepoints.from_pretrained("keynet", num_keypoint=3)


def test_repositories_need_huggingface_hub(folder, monkeypatch):
    calls = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        if name.endswith("missing"):
            raise OSError("404 Client Error\nmore lines")
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        tiepoints.from_pretrained("somebody/keynet-mine")
    fake = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    names = options_of("somebody/keynet-mine", revision="v1")
    assert names[0] == str(folder / "my-sobelnet.safetensors")
    # never code or pickles
    assert calls == [("somebody/keynet-mine", "v1", ["*.safetensors"])]
    with pytest.raises(WeightsError, match=r"could not be downloaded .*\(404 Client Error\)"):
        tiepoints.from_pretrained("somebody/missing")


def test_torch_hub_loads_from_a_copy_that_is_not_installed(tmp_path):
    """In a process whose only ``tiepoints`` is that of the copy."""
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    code = (
        "import sys, torch\n"
        "sys.path = [p for p in sys.path if 'src' not in p.split('/')]\n"
        f"path = {str(tmp_path)!r}\n"
        "e = torch.hub.load(path, 'extractor', 'sobelnet-desnet', source='local', device='cpu')\n"
        "import tiepoints; print(tiepoints.__file__)\n"
        "print(len(e.extract(torch.rand(1, 1, 90, 120)).descriptors[0]))\n"
        "print(type(torch.hub.load(path, 'network', 'keynet', source='local')).__name__)\n"
        "sys.path.insert(0, path); import hubconf\n"
        "print([n for n in dir(hubconf) if n[0] != '_' and callable(getattr(hubconf, n))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == [
        str(tmp_path / "src" / "tiepoints" / "__init__.py"),
        "128",
        "KeyNet",
        "['extractor', 'network']",
    ]


@pytest.mark.parametrize("name", list(table()))
def test_model_card_of_embedded_weights(name):
    code, text, _ = call("weights", "card", name)
    assert code == 0
    header, body = text.split("---\n")[1:]
    assert "license: apache-2.0" in header
    assert ("pipeline_tag" in header) == (name in DETECTORS)
    entry = table()[name]
    assert f"# {name}\n" in body
    assert f"{entry['network']}, a " in body
    assert entry["sha256"] in body
    assert f'from_pretrained("{name}")' in body
    assert re.search(r"\| (repeatability|matching) \| 0\.\d{3,4} \|", body)
    assert "/tmp" not in body
    assert "docs/weights.md" in body


def test_model_card_of_a_file(folder):
    code, text, _ = call("weights", "card", folder / "my-desnet.safetensors")
    assert code == 0
    assert "license" not in text
    assert 'from_pretrained("OWNER/my-desnet")' in text
    assert "unit descriptors of dimension 128" in text
    code, _, error = call("weights", "card", folder / "nothing.safetensors")
    assert code == 2
    assert "known names are keynet" in error
