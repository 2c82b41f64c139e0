"""The commands, snippets and links of the README and of docs/ are valid."""

import re
import shlex
from pathlib import Path

import pytest

from segdeconv.cli.own_code import compose
from segdeconv.training.config_check import check_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for block in re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.strip().startswith(("python scripts/", "segdeconv "))
    }
)


def test_the_pages_contain_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_names_a_script_and_keys_that_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT / "docs" / "own_code")  # the working directory of the commands in docs/own-code.md
    monkeypatch.syspath_prepend(".")
    program, *words = shlex.split(line, comments=True)
    script = ROOT / (f"scripts/{words[0]}.py" if program == "segdeconv" else words[0])
    assert script.is_file()
    if script.stem in ("train", "inspect_data", "find"):
        keys = [word for word in words[1:] if "=" in word]
        if "--multirun" in words:  # checks the first job only
            keys = [word if "[" in word else word.split(",")[0] for word in keys]
        config, _ = compose(keys)
        check_config(config)
    else:
        cli = ROOT / "segdeconv" / "cli"
        sources = [script, cli / "options.py", *cli.glob(f"{script.stem}.py")]
        source = "".join(path.read_text() for path in sources)
        for option in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
            assert f'"{option}"' in source


def test_the_packages_and_scripts_are_listed():
    listed = PAGES[0].read_text().split("## The packages")[1].split("```")[1]
    names = [f"{path.parent.name}/" for path in (ROOT / "segdeconv").glob("*/__init__.py")]
    names += [path.stem for path in (ROOT / "scripts").glob("*.py")]
    assert [name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", listed)] == []


def test_every_snippet_of_the_questions_page_runs():
    page = ROOT / "docs" / "questions.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 9
    exec(compile("\n".join(blocks), str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_has_a_target(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        if "://" not in target:
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(page):
    """Return the anchors that a code host gives to the headings of a Markdown page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
