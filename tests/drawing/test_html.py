"""HTML pages: self-contained, with escaped content and small pictures."""

from __future__ import annotations

import base64
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from segdeconv.drawing import html


def opened(picture: html.Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))


@pytest.mark.parametrize("few_colours", [False, True])
def test_a_picture_of_noise_is_reduced_until_it_fits(few_colours):
    noise = np.random.default_rng(0).integers(0, 256, (480, 360, 3)).astype(np.uint8)
    picture = html.picture(noise, few_colours=few_colours)
    assert len(picture.uri) < html.MAX_BYTES * 4 / 3 + 100
    assert opened(picture).size == (picture.width, picture.height)
    assert picture.height / picture.width == pytest.approx(480 / 360, abs=0.02)


@pytest.mark.parametrize("size", [(1, 1), (1, 480), (48, 64)])
def test_a_picture_of_few_colours_is_lossless(size):
    image = np.random.default_rng(0).choice(np.array([0, 90, 255], np.uint8), (*size, 3))
    np.testing.assert_array_equal(np.asarray(opened(html.picture(image, few_colours=True)).convert("RGB")), image)


def rendered(**content) -> str:
    empty = {"data": "", "classes": (), "notes": (), "splits": (), "shares": (), "absent": (), "ignored": None}
    checks = {"verdict": (True, ""), "findings": (), "inventory": (), "values": (), "duplicates": (0,)}
    others = {**checks, "weights": (), "problems": (), "suspects": (), "rarest": (), "samples": (), "configuration": ""}

    class Empty:
        names = labels = colours = ignored_labels = ()
        ignore_colour = None

        def __len__(self):
            return 0

    class Split:
        bits, mean, split, num_images, sizes, images, std = 8, (), "train", 0, (), (0,), ()
        formats = flat = ()

    content = {**empty, **others, "classes": Empty(), "splits": [Split()], "shares": [[0]], "absent": [[]], **content}
    return html.render("inspect.html", command="", **content)


def test_content_is_escaped():
    page = rendered(data="<script>alert(1)</script>", notes=["\"quoted\" & 'so'"])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&#34;quoted&#34; &amp; &#39;so&#39;" in page


def test_the_policy_allows_the_only_script():
    page = rendered()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page or f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_a_page_makes_no_requests():
    assert not re.search(r"(src|href)=\"(?!data:|#|https://arxiv\.org)|url\(|@import", rendered())


def test_invalid_unicode_in_a_file_name_is_escaped(tmp_path):
    html.write("caf\udce9 – 🙂", tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_bytes() == "caf\\udce9 – 🙂".encode()
    assert len(list((tmp_path / "deep").iterdir())) == 1
