"""One file with everything inside: nothing is fetched, names stay text, pictures stay small."""

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


@pytest.mark.parametrize("few", [False, True])
def test_noise_is_made_smaller_until_it_fits(few):
    noise = np.random.default_rng(0).integers(0, 256, (480, 360, 3)).astype(np.uint8)
    made = html.picture(noise, few=few)
    assert len(made.uri) < html.MOST_BYTES * 4 / 3 + 100
    assert opened(made).size == (made.width, made.height)
    assert made.height / made.width == pytest.approx(480 / 360, abs=0.02)


@pytest.mark.parametrize("size", [(1, 1), (1, 480), (48, 64)])
def test_a_map_of_few_colours_is_kept_exactly(size):
    image = np.random.default_rng(0).choice(np.array([0, 90, 255], np.uint8), (*size, 3))
    np.testing.assert_array_equal(np.asarray(opened(html.picture(image, few=True)).convert("RGB")), image)


def shown(**content) -> str:
    nothing = {"data": "", "classes": (), "notes": (), "splits": (), "shares": (), "absent": (), "ignored": None}
    more = {"weights": (), "problems": (), "suspects": (), "rarest": (), "samples": (), "configuration": ""}

    class Empty:
        names = labels = colours = ignored_labels = ()
        ignore_colour = None

        def __len__(self):
            return 0

    class Split:
        bits, mean, split, num_images, sizes, images, std = 8, (), "train", 0, (), (0,), ()

    content = {**nothing, **more, "classes": Empty(), "splits": [Split()], "shares": [[0]], "absent": [[]], **content}
    return html.render("inspect.html", command="", **{**content})


def test_whatever_is_put_in_is_text():
    html = shown(data="<script>alert(1)</script>", notes=["\"quoted\" & 'so'"])
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&#34;quoted&#34; &amp; &#39;so&#39;" in html


def test_the_one_script_is_the_one_that_the_policy_admits():
    html = shown()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html or f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def test_nothing_is_fetched():
    assert not re.search(r"(src|href)=\"(?!data:|#|https://arxiv\.org)|url\(|@import", shown())


def test_a_name_that_is_no_unicode_can_be_written(tmp_path):
    html.write("caf\udce9 – 🙂", tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_bytes() == "caf? – 🙂".encode()
    assert len(list((tmp_path / "deep").iterdir())) == 1
