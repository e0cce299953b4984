"""YAML that a stranger wrote: limits, words that stay text, and what is refused."""

import pytest
import yaml

from untrusted.json_text import parse_json
from untrusted.yaml_text import MAX_BYTES, YAMLTextError, dump_yaml, parse_yaml

DEEP = {
    "flow lists": "[" * 100_000,
    "flow mappings": "{a: " * 50_000,
    "block lists": "- " * 40_000,
    "closed lists": "[" * 5_000 + "]" * 5_000,
    "mixed": "a: [{b: [" * 1_000,
}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
LARGE = {
    "many values": "a: [" + "1," * 100_000 + "]",
    "aliases of aliases": BOMB,
    "merged aliases": BOMB.replace("[*", "[{<<: {q: *").replace(",*", "}},{<<: {q: *"),
    "an alias of itself": "a: &a [*a]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(60_000)),
    "long text": "a: " + "x" * MAX_BYTES,
    "a long number": "a: " + "1" * 5_000,
}
WORDS = (
    "1e6", "010", "0x10", "1_000", "1:30", "no", "off", "on", "yes", "y", "true", "null", "~", "",
    ".5", "1.", "+1", "-.inf", ".nan", "2020-01-01", "<<", "=", "a: b", "- a", "#a", "x\ny",
    "\u4e2d\u6587", "\u00e9", "\x00", "@x", "&a", "*a", "!x", "%x", "'", '"', "1e", "e1", "1e6a",
)  # fmt: skip


@pytest.mark.parametrize("text", [*DEEP.values(), *LARGE.values()], ids=[*DEEP, *LARGE])
def test_text_beyond_a_limit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(YAMLTextError) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "[" * 80 + "]" * 80])
def test_json_beyond_a_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json(text)


def test_brackets_within_json_text_are_no_depth() -> None:
    assert parse_json('["' + "[" * 1_000 + '\\"{"]') == ["[" * 1_000 + '"{']


@pytest.mark.parametrize("word", WORDS)
def test_text_that_looks_like_another_value_survives(word: str) -> None:
    plain = {"value": word, "list": [word], "key": {word: 1}}
    assert parse_yaml(dump_yaml(plain)) == plain
    assert yaml.safe_load(dump_yaml(plain)) == plain


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("1e6", 1e6),
        ("1e-30", 1e-30),
        ("1234e5678901", "1234e5678901"),
        ("1234567890e1", "1234567890e1"),
        ("12e3456789", "12e3456789"),
        ("2e5", 2e5),
        ("2.5e+300", 2.5e300),
        ("1_000", 1000),
        ("-3", -3),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("~", None),
        ("'true'", "true"),
        ('"1"', "1"),
    ],
)
def test_only_decimal_numbers_true_false_and_null_are_not_text(text: str, value: object) -> None:
    read = parse_yaml(text)
    assert (type(read), read) == (type(value), value)


def test_keys_are_text() -> None:
    assert parse_yaml("{no: 1, on: 2, 010: 3, 1e6: 4, null: 5, true: 6, 7: 7}") == {
        "no": 1, "on": 2, "010": 3, "1e6": 4, "null": 5, "true": 6, "7": 7,
    }  # fmt: skip


def test_an_alias_is_read_as_what_it_names() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: !!python/object/apply:os.system [x]", "tag"),
        ("a: !!int 3", "tag"),
        ("a: ${oc.env:HOME}", "interpolation"),
        ('"${x}": 1', "interpolation"),
        ("a: 1\na: 2", "duplicate key a"),
        ("a: *b", "no finished anchor"),
        ("? [a]\n: 1", "not a plain word"),
        ("a: 1\n---\nb: 1", "second document"),
        ("a: {<<: 3}", "mappings only"),
        ("a: [1,", "line 2"),
        ("a: \x00", "control characters"),
    ],
)
def test_yaml_that_no_config_needs_is_refused_with_its_reason(text: str, why: str) -> None:
    with pytest.raises(YAMLTextError, match=why) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)
