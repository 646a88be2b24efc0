"""Links between the Markdown files, as a reader on a forge follows them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from programs import ROOT

# Not of caches, environments, runs, nor templates that become pages.
FOLDERS = ("", "benchmarks/", "bundles/**/", "docs/", "studies/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Without code, in which brackets mean other things."""
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(text: str) -> set[str]:
    """Of the headings: lower case, hyphens for spaces, letters and digits; a number where one comes again."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M):
        heading = LINK.sub(lambda match: match[0][match[0].index("[") + 1 : match[0].index("]")], heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def problems(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    wrong = []
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or ROOT not in target.parents:
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert problems(page) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Two words, `code`\n# Again\n# Again\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    good = ("other.md", "other.md#two-words-code", "other.md#again-1", "#here", "https://example.org/#x")
    bad = ("none.png", "other.md#two-words", "other.md#no-heading", "../outside.md")
    page.write_text("# Here\n" + " ".join(f"[text]({link})" for link in (*good, *bad)) + "\n`[code](no link)`\n")
    assert [problem.split(":")[0] for problem in problems(page)] == list(bad)


def test_pages_of_the_site_exist():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert [page for page in pages(site["nav"]) if not (ROOT / page).is_file()] == []


def documented(bundle: str, column: int) -> dict[str, object]:
    """Defaults of the options of training in a bundle's README, by option; text where it is no plain value."""

    def value(text: str) -> object:
        try:
            return json.loads(text)
        except ValueError:
            return text

    page = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text()
    table = page.split("| option | meaning | default | `small.yaml` |\n")[1].split("\n\n")[0]
    found = {}
    for line in table.splitlines()[1:]:
        cells = line.split("|")[1:-1]
        values = re.findall(r"\[.*?\]|[^\s,|]+", cells[column])
        found |= dict(zip(re.findall(r"--([\w#]+)", cells[0]), map(value, values), strict=False))
    return found


@pytest.mark.parametrize(("bundle", "least"), [("pgl_pretrain", 24), ("pgl_segmentation", 24)])
def test_documented_defaults_are_those_of_the_configs(bundle, least):
    defaults = json.loads((ROOT / "bundles" / bundle / "configs" / "train.json").read_text())
    plain = (bool, int, float, list)
    shown = {name: value for name, value in documented(bundle, 2).items() if isinstance(defaults.get(name), plain)}
    assert len(shown) >= least
    assert shown == {name: defaults[name] for name in shown}


@pytest.mark.parametrize(("bundle", "least"), [("pgl_pretrain", 14), ("pgl_segmentation", 6)])
def test_documented_values_of_the_small_preset_are_its_own(bundle, least):
    preset = yaml.safe_load((ROOT / "bundles" / bundle / "configs" / "small.yaml").read_text())
    shown = documented(bundle, 3)
    assert len(shown) >= least
    assert shown == {name: preset.get(name, "not in small.yaml") for name in shown}
