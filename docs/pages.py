"""MkDocs takes its pages from one folder; ours lie beside what they describe, and link to each other there."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Pages, and what they show or link to.
PATTERNS = (
    *("*.md", "LICENSE", "CITATION.cff", "docs/*.md", "docs/images/*", "studies/*", "benchmarks/*.py"),
    *("bundles/*/docs/*", "bundles/*/configs/**/*.md", "bundles/*/configs/**/*.json", "bundles/*/configs/**/*.yaml"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every page at its path in the repository, beside the theme's own files."""
    root = Path(config.config_file_path).parent
    paths = sorted({path for pattern in PATTERNS for path in root.glob(pattern)})
    theme = [file for file in files if file.inclusion.is_excluded() or file.src_dir != config.docs_dir]
    pages = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in paths]
    return Files([*theme, *pages])
