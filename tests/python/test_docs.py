"""What the documents point to exists: links, and the paths of files they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
# A path in a document may be given from the root, from the document, or from the part of the tree that it is about.
BASES = [ROOT, *(ROOT / base for base in ("python", "python/fpsattention", "csrc", "include", "tests"))]
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|h|cpp|cu|cuh|md|sh|cmake|json|txt))`")
MADE = ("build/", "captures/", "runs/")  # by commands that the documents describe


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_references_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]
    paths = [path for path in PATH.findall(text) if not path.startswith(MADE)]
    bases = [*BASES, document.parent, ROOT / "csrc" / document.stem]  # docs/kernels/OP.md is about csrc/OP
    assert not [path for path in paths if not any((base / path).exists() for base in bases)]
