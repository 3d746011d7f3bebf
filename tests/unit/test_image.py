"""What can be said of Dockerfile.cuda without Docker."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_all_that_the_image_copies_is_sent_to_the_builder() -> None:
    copied = set()
    for line in (ROOT / "Dockerfile.cuda").read_text().splitlines():
        if found := re.fullmatch(r"COPY (?!--from)(.+) \S+", line):
            copied |= set(found[1].split())
    ignored, *sent = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    assert copied
    assert copied == {line[1:] for line in sent if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
