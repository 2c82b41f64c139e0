"""What the documentation site has beside the pages of docs/: files of the project's root and an API reference.

mkdocs.yml names this file as a hook.
"""

import pkgutil
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages outside docs/, by their name on the site.
PAGES = {
    "index.md": "README.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}


def modules() -> list[str]:
    """Return the packages and top-level modules of segdeconv, in the order of README's list."""
    names = [module.name for module in pkgutil.iter_modules([str(ROOT / "segdeconv")])]
    listed = re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    names.remove("__main__")
    return sorted(names, key=lambda name: (listed.index(name) if name in listed else -1, name))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the reference into the navigation."""
    for entry in config["nav"]:
        if "Reference" in entry:
            entry["Reference"] = [{f"segdeconv.{name}": f"reference/{name}.md"} for name in modules()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=f"::: segdeconv.{name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files of the project at the pages of the site."""
    names = {source: name for name, source in PAGES.items()}
    markdown = re.sub(r"\]\((?:docs/)([^)]+)\)", r"](\1)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?([A-Z]+\.md)", lambda link: f"]({names[link[1]]}", markdown)
    markdown = re.sub(r"\]\(\.\./segdeconv/(\w+)[^)]*\)", r"](reference/\1.md)", markdown)
    return re.sub(r"\]\(\.\./configs[^)]*\)", "](options.md)", markdown)
