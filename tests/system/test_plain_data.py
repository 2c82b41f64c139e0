"""Bounded readers of JSON and YAML: what they accept, and families of texts that they refuse soon."""

import json
import time

import pytest
import yaml
from hostile_texts import JSONS, YAMLS
from hypothesis import given
from hypothesis import strategies as st

from segdeconv.system.plain_data import (
    Limits,
    PlainDataError,
    check_plain,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_yaml,
    require_mapping,
)  # fmt: skip

SECONDS = 3.0  # PyYAML takes one for the largest text within the limits


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_of_other_forms_is_refused(name):
    started = time.process_time()
    with pytest.raises(PlainDataError) as caught:
        parse_yaml(YAMLS[name])
    assert time.process_time() - started < SECONDS
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["integers", "64 bits", "sexagesimal", "nan", "infinite", "long integer"])
def test_numbers_are_not_read_where_everything_stays_text(name):
    assert parse_yaml(YAMLS[name], as_text=True)["a"] == YAMLS[name].removeprefix("a: ")


@pytest.mark.parametrize("name", ["laughs 20", "recursive", "flow 1000", "tag bool", "tag of its own", "repeated key"])
def test_text_is_as_bounded_as_values(name):
    with pytest.raises(PlainDataError):
        parse_yaml(YAMLS[name], as_text=True)


@pytest.mark.parametrize("name", JSONS)
def test_json_of_other_forms_is_refused(name):
    started = time.process_time()
    with pytest.raises(PlainDataError) as caught:
        parse_json(JSONS[name])
    assert time.process_time() - started < SECONDS
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=("Cs", "Cc"))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_plain_data_is_read_as_it_was_written(data):
    assert check_plain(data) == data
    assert parse_json(json.dumps(data)) == data
    assert parse_yaml(yaml.safe_dump(data)) == data


def test_a_shared_list_becomes_a_copy_in_every_place():
    shared = [1, 2]
    copied = check_plain({"a": shared, "b": [shared, shared]})
    assert copied == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert copied["a"] is not copied["b"][0]
    assert parse_yaml(yaml.safe_dump({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}


def test_dates_and_merge_keys_are_text_as_in_the_files_that_hydra_reads():
    assert parse_yaml("day: 2020-01-01\n'<<': 1\nx: =") == {"day": "2020-01-01", "<<": 1, "x": "="}
    assert parse_yaml("<<: {a: 1}\nb: 2") == {"<<": {"a": 1}, "b": 2}


def test_tuples_and_further_types_are_kept_on_request():
    assert check_plain((1, (2,))) == [1, [2]]
    assert check_plain((1, b"x"), leaves=(bytes,), tuples=True) == (1, b"x")
    with pytest.raises(PlainDataError, match="a value of type bytes"):
        check_plain([b"x"])
    with pytest.raises(PlainDataError, match="a key of type tuple"):
        check_plain({(1,): 2})


def test_depth_is_that_of_the_deepest_reference():
    inner = [[[1]]]
    check_plain([inner, inner], Limits(depth=4))
    with pytest.raises(PlainDataError, match="deeper than 4 levels"):
        check_plain([inner, [inner]], Limits(depth=4))


def test_a_file_is_read_no_further_than_its_limit(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    for read in (read_bytes, read_json, read_yaml):
        with pytest.raises(PlainDataError, match="is larger than"):
            read(path)


@pytest.mark.parametrize("data", [None, [], "a", 1, {1: 2}])
def test_a_mapping_with_names_is_required(data):
    with pytest.raises(PlainDataError, match="is not a mapping with names as keys"):
        require_mapping(data)
