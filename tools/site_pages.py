"""A hook of mkdocs: pages of the site that lie outside `docs/`, and links that lead out of it.

The pages in `PAGES` are shown where they are named here. A source file that a page links to becomes a page with its
code; pictures and data are copied. Every link then leads within the site, so `mkdocs build --strict` checks it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # path in the repository -> path in the site
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "src/nova_video/models/emoji/README.md": "model-card.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:)([^)#\s]+)")
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".jsonl": "json", "": "text", ".cff": "yaml"}
SETTINGS = "<!-- settings -->"  # the site has a table of every setting of a request here
LARGEST_PAGE = 200_000  # bytes; what is larger is copied as it is


def site_path(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and Path(path).suffix in (".md", ".png", ".svg", ".webp"):
        return path.removeprefix("docs/")
    if Path(path).suffix in LANGUAGES and (ROOT / path).stat().st_size <= LARGEST_PAGE:
        return f"source/{path}.md"
    return f"source/{path}"


def repository_path(page: str, target: str) -> str:
    """The file that a link of a page leads to, both as paths in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def rewrite_links(text: str, page: str) -> str:
    """The page's text with the site's places in its links. A link to a folder becomes plain text."""
    start = posixpath.dirname(site_path(page))

    def relative(match: re.Match[str]) -> str:
        path = repository_path(page, match[1])
        return posixpath.relpath(site_path(path), start or ".")

    def is_folder(target: str) -> bool:
        return (ROOT / repository_path(page, target)).is_dir()

    text = re.sub(
        r"\[([^\]]+)\]\(((?!https?:)[^)#\s]+)\)", lambda match: match[1] if is_folder(match[2]) else match[0], text
    )
    return LINK.sub(relative, text)


def settings_table() -> str:
    """Every setting of a request as a table, from the fields that declare them."""
    from nova_video.common.option_fields import choices_of, facts_of, key_of, kind_of, option_fields
    from nova_video.pipeline.options import Options

    rows = ["| Python | command | default | meaning |", "|---|---|---|---|"]
    for name, each in option_fields(Options).items():
        facts = facts_of(each)
        names = ", ".join(f"`{python}`" for python in (name, *facts.aliases))
        flag = f"`--{key_of(each).replace('_', '-')}`"
        default = facts.unset or ("" if each.default is None else f"`{each.default}`")
        choices = " or ".join(f"`{choice}`" for choice in choices_of(kind_of(each)))
        bounds = "" if facts.low is None or facts.high is None else f" From {facts.low:,} to {facts.high:,}."
        meaning = facts.help + (f" One of {choices}." if choices else "") + bounds
        rows.append(f"| {names} | {flag} | {default} | {meaning} |")
    return "\n".join(rows)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and every file that a page links to."""
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {
        repository_path(page, target)
        for page in pages
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    }
    for path in sorted({*PAGES, *linked}):
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"a page links to {path}, which does not exist")
        place = site_path(path)
        if (ROOT / path).is_dir() or files.get_file_from_path(place) is not None:
            continue
        if path in PAGES or not place.endswith(".md"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        else:
            code = (ROOT / path).read_text(encoding="utf-8")
            content = f"# {path}\n\n````{LANGUAGES[Path(path).suffix]}\n{code}````\n"
            files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point the links of each page to places in the site."""
    place = page.file.src_uri
    if place.startswith("source/"):
        return markdown
    paths = {site: path for path, site in PAGES.items()}
    text = rewrite_links(markdown, paths.get(place, f"docs/{place}"))
    if SETTINGS in text:
        text = text.replace(SETTINGS, settings_table())
    if page.file.src_uri != "index.md" and text.startswith("---"):  # the head of a model card is for the hub
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    return text
