"""README and docs: length, links and Python examples."""

import re
import tomllib
from pathlib import Path

import pytest
import timm
from PIL import Image

from tests.conftest import ROOT, SHIPPED_MODEL

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_resolve(page):
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in links(README.read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_description_on_pypi_has_no_local_links():
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = README.read_text(encoding="utf-8")
    for substitution in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert links(text) and all(link.startswith("https://") for link in links(text))
    assert "read from the plot in Benchmark. " in " ".join(text.split()) and "| Training " in text


def test_readme_example_classifies_an_image(tmp_path, monkeypatch, capsys):
    code = next(code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "topk" in code)
    online = re.search(r'timm\.create_model\("([^"]+)", pretrained=True\)', code)
    assert timm.is_model(online[1]) and timm.is_model_pretrained(online[1])
    code = code.replace(online[1], f"local-dir:{SHIPPED_MODEL}")
    Image.new("RGB", (80, 60), "white").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.fullmatch(r" *[\d.]+%  \d", line) for line in lines)


def test_recommended_models_have_the_published_facts():
    from res2net_zoo import catalog

    known = catalog.load()
    rows = re.findall(r"^\| [a-z -]+ +\| `([^`]+in1k)` +\|(.*)\|$", README.read_text(), re.M)
    assert len(rows) == 3
    for name, cells in rows:
        checkpoint, architecture = known.checkpoint(name), known.architectures[name.split(".")[0]]
        params, gmacs, top1, _, license = (cell.strip() for cell in cells.split("|"))
        assert params == f"{architecture.parameters / 1e6:.1f}" and gmacs == f"{architecture.macs / 1e9:.1f}"
        assert top1 == f"{checkpoint.accuracies[0].top1:.2f}"
        assert license == checkpoint.license + ("\\*" if checkpoint.license_note else "")
