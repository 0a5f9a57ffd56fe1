"""The documentation's links, addresses and versions."""

import re
from pathlib import Path

import pytest

import e88_jax

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "[a-z]*/README.md", "tests/*/README.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}


def test_every_address_of_the_code_is_a_reference():
    references = (ROOT / "docs/references.md").read_text()
    cited = set[str]()
    for folder in ("e88_jax", "pallas_kernels", "experiments", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            cited.update(re.findall(r"(?:arxiv\.org/abs/|arXiv:)(\d{4}\.\d{5})", text))
            cited.update(re.findall(r"https://github\.com/[\w-]+/[\w-]+", text))
    assert cited
    assert {address for address in cited if address not in references} == set()


def test_the_citation_has_the_package_s_version():
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == e88_jax.__version__
