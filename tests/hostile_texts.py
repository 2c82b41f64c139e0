"""Texts that are not plain JSON or YAML, or describe more data than a reader may build, by a short name."""


def laughs(depth, width=9):
    """Return the "billion laughs": lists that refer to the one before them `width` times."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, depth)]
    return "\n".join(lines)


YAMLS = {
    **{f"laughs {depth}": laughs(depth) for depth in (7, 20, 60)},
    **{f"doubled {depth}": laughs(depth, 2) for depth in (20, 60)},
    "recursive": "&a [*a]",
    "recursive mapping": "&a {b: *a}",
    **{f"flow {depth}": "[" * depth + "]" * depth for depth in (65, 1000, 100_000)},
    **{f"mappings {depth}": "{a: " * depth + "1" + "}" * depth for depth in (65, 1000, 100_000)},
    **{f"block {depth}": "- " * depth + "1" for depth in (65, 1000, 100_000)},
    **{f"tag {tag}": f"a: !!{tag} abc" for tag in (
        "bool", "int", "float", "null", "timestamp", "binary", "str", "set", "omap", "python/name:os.system", "merge")},
    "tag of a key": "!!bool a: 1",
    "tag of its own": "a: !mine 1",
    "tag of a list": "a: !!set [1]",
    "repeated key": "a: 1\nb: 2\na: 3",
    "repeated key inside": "x: {a: 1, a: 2}",
    "key of a list": "? [1]\n: 2",
    "two documents": "a: 1\n---\nb: 2",
    "wide": "[" + "1," * 30_000 + "1]",
    "large": "a" * (1 << 20) + "b",
    "integers": "a: 0b_",
    "long integer": "a: " + "9" * 5000,
    "64 bits": "a: 18446744073709551616",
    "sexagesimal": "a: 1" + ":59" * 1000,
    "nan": "a: .nan",
    "infinite": "a: -.inf",
    "unknown alias": "a: *b",
    "control": "a: \x00",
    "surrogate": 'a: "\\ud800"',
    "surrogate as a character": "a: \ud800",
    "unclosed": "a: [",
    "tab": "a:\n\t- b",
}  # fmt: skip


JSONS = {
    **{f"{name} {depth}": start * depth + end * depth for depth in (65, 900, 100_000)
       for name, start, end in (("lists", "[", "]"), ("mappings", '{"a":', "}"))},
    "nan": "[NaN]",
    "infinity": "[-Infinity]",
    "overflow": "[1e999]",
    "long integer": f"[{'9' * 100}]",
    "longer integer": f"[{'9' * 10_000}]",
    "surrogate": '["\\ud800"]',
    "surrogate in a key": '{"\\udfff": 1}',
    "wide": "[" + "0," * 300_000 + "0]",
    "large": '"' + "a" * (1 << 24) + '"',
    "empty": "",
    "truncated": '{"a": 1',
    "two": "{} {}",
    "not UTF-8": b"\xff",
}  # fmt: skip
