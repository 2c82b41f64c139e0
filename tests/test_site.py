"""The documentation site: make docs builds it without a warning, and it opens from the disk without a network."""

import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser_page, needs_chromium

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_every_package_has_a_page_with_its_public_names(site):
    packages = [path.parent.name for path in (ROOT / "segdeconv").glob("*/__init__.py")]
    assert len(packages) >= 16
    for name in packages:
        assert f"segdeconv.{name}" in (site / "reference" / f"{name}.html").read_text()
    for name in ("segdeconv.models.SegNet", "segdeconv.switches.max_pool", "segdeconv.train.train"):
        page = name.split(".")[1]
        assert f'id="{name}"' in (site / "reference" / f"{page}.html").read_text()


@needs_chromium
def test_the_site_opens_and_searches_from_the_disk(site):
    with browser_page() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "reference" / "models.html").as_uri())
        page.locator("input[name=query]").first.click()
        page.keyboard.type("unpool")
        page.get_by_text("matching documents").wait_for()
        assert page.locator(".md-search-result__item").count() >= 5
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
