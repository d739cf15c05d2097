"""Source, documentation and examples use the field's terms instead of private words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: The diary is a record of its time.
EXCLUDED = {ROOT / "docs" / "diary.md"}
SUFFIXES = {".py", ".md", ".rst", ".toml", ".html", ".css", ".js", ".sh", ".txt"}

#: Pattern (case-insensitive) -> what to write instead.
PRIVATE_WORDS = {
    r"\bwrong words\b": "invalid arguments",
    r"\ba place once\b|\bdistinct places\b": "one keypoint per location, unique locations",
    r"\bdoors?\b": "entry point, interface",
    r"\bone home for\b|\b_HOMES\b": "exports",
    r"\baloud\b": "with a warning, raises",
    r"\bleft out\b": "skipped, omitted",
    r"\bbeside\b": "next to, in addition to, compared with",
    r"\bkey points?\b": "keypoints",
    r"\bmanieth\b": "every N-th",
    r"\bgoes on\b|\bgo on (from|where)\b": "resumes, continues",
    r"\banew\b|\bafresh\b": "start over, again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bright matches\b|\b(a|each|every) right match\b|\brightly\b": "correct matches",
    r"\bwrong match(es)?\b|\bwrongly\b": "incorrect matches",
    r"\bcommonest\b": "dominant",
    r"\bas (it|they|he) likes?\b": "(state the condition)",
    r"\bso many\b": "(state the number)",
    r"\bdescriptors? of \d+ numbers\b|\bnumbers a descriptor\b": "descriptor dimension",
    r"\b(points|keypoints|seconds|matches|ms|numbers) an? (image|frame|pair|patch)\b": "per image",
    r"\b(frames|pictures|images) a second\b": "per second",
    r"\b(resizing|coordinate|sampling|half-pixel) law\b|\blaw says\b": "convention",
    r"\bnever look(s|ed)? at the image\b": "independent of the image content",
    r"\bNone of none\b|\bNones? where there\b": "None if ..., empty if ...",
    r"\b(quarter|half)[ -]turns?\b": "rotation by 90 or 180 degrees",
    r"\bturned (by|round|copy|photo|images?|(key)?points|patch(es)?|clockwise)\b": "rotated",
    r"\bis held to\b": "is tested against",
    r"\bjudg(e|es|ed|ment|ement)\b": "verify",
    r"\bbr(eaks|oke|oken) off\b": "is truncated",
    r"\bbusy machine\b|\bseen before the choice\b": "(describe the method)",
    r"\bhand(s|ed)? over\b": "pass, return",
    r"\bthere and back\b": "round trip",
    r"\bslow twin\b|\bplain twin\b": "reference implementation",
    r"\bspeaks? up\b|\bwithout a word\b": "(state the behavior)",
    r"\b(is|are|be) told\b": "is reported",
    r"\bcommas between\b": "comma-separated",
    r"\banswers? (at|beside|alike|with|everything)\b": "responds, is biased",
    r"\bhow a (run|training) went\b": "result",
    r"\bthe very (same|corner|pixels?)\b": "the same",
    r"\bkeep_common_rotation\b|\bkeep_memory\b|\btake_over\b|\bpeakedness\b": "(see the glossary)",
    r"\beven_light\b|\bhalvings\b|\bOneMapConv\b|\bby_strips\b|\bmaps_of\b": "(see the glossary)",
    r"\bQUICK_CHANNELS\b|\bRIGHT_TURN\b|\bas_picture\b|\bpeaks_of\b|\bsay=": "(see the glossary)",
    r"\bgrey\b|\w*(colour|centre|neighbour|behaviour|favour)\w*": "American spelling",
    r"\b\w*(normal|initial|recogn|optim|regular|quant|minim|maxim)is(e|ed|es|ing|ation)\b": (
        "American spelling"
    ),
}


def files(name: str) -> list[Path]:
    """The file, or the text files of the folder."""
    path = ROOT / name
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        file
        for file in found
        if file.suffix in SUFFIXES and file not in EXCLUDED and "_build" not in file.parts
    ]


def hits(text: str) -> list[tuple[int, str, str]]:
    """(line number, private word, what to write instead)."""
    return [
        (number, match.group(0), instead)
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in PRIVATE_WORDS.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", ["src", "examples", "README.md", "docs"])
def test_no_private_words(name):
    lines = [
        f"{file.relative_to(ROOT)}:{number}: {word!r}, write: {instead}"
        for file in files(name)
        for number, word, instead in hits(file.read_text(encoding="utf-8"))
    ]
    assert not lines, "\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "line",
    [
        "The image is turned into a tensor; corners at the right match those at the left.",
        "Besides keypoints, the detector returns angles.",
        "rotation by 90 degrees, half of the images, a quarter of the pixels, side by side",
        "many keypoints; the number of keypoints per image; images per second",
        "recommended settings of a commonly used method, as in the paper",
        "normalize, initialize, center, color, gray, a raised exception, a promise",
        "the camera stops; training resumes; the file is skipped with a warning",
        "outdoors and indoors",
    ],
)
def test_patterns_accept_plain_english(line):
    assert not hits(line)
