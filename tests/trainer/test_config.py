"""Run configs: loading, ids, and every misspelt key."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.trainer.conftest import PLAIN
from trainer.config import ExecutionConfig, RunConfig
from trainer.ids import run_id, trunk_id
from trainer.schema import ConfigError, dump, load, merge, read_overrides, read_yaml


def paths(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


FREE = {("corpus", "domains", "python"), ("corpus", "domains", "prose"), ("model", "blocks", "a")}
KEYS = [path for path in paths(PLAIN) if path not in FREE and path[-1] != "kind"]


def changed(path: tuple[str, ...], change: Any) -> dict[str, Any]:
    tree = copy.deepcopy(PLAIN)
    below = tree
    for key in path[:-1]:
        below = below[key]
    change(below, path[-1])
    return tree


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_misspelt_key_is_named_with_the_right_one(path: tuple[str, ...]) -> None:
    wrong = path[-1][:-1] + "_x"

    def misspell(below: dict, key: str) -> None:
        below[wrong] = below.pop(key)

    with pytest.raises(ConfigError, match="unknown key") as raised:
        load(RunConfig, changed(path, misspell))
    assert ".".join((*path[:-1], wrong)) in str(raised.value)
    assert path[-1] in str(raised.value)


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_value_of_another_type_is_refused_with_its_key(path: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(RunConfig, changed(path, lambda below, key: below.update({key: object()})))
    assert ".".join(path) in str(raised.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_learning_rate_that_is_no_rate_is_refused(plain: dict, bad: float) -> None:
    plain["optimizer"]["learning_rate"] = bad
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
        load(RunConfig, plain)


def test_an_unknown_mixer_is_named_with_the_known_ones(plain: dict) -> None:
    plain["model"]["blocks"]["a"]["mixer"] = {"kind": "manba"}
    with pytest.raises(ConfigError, match="'manba' is unknown; did you mean 'mamba'"):
        load(RunConfig, plain)


def test_a_budget_that_is_no_whole_number_of_batches_is_refused(plain: dict) -> None:
    plain["budget"]["tokens"] = 10241
    with pytest.raises(ConfigError, match="whole number of batches of 512 tokens"):
        load(RunConfig, plain)


def test_a_config_survives_dump_and_load(plain: dict) -> None:
    config = load(RunConfig, plain)
    again = load(RunConfig, dump(config))
    assert again == config
    assert run_id(again) == run_id(config)


def test_writing_out_a_default_keeps_the_id(plain: dict) -> None:
    before = run_id(load(RunConfig, plain))
    plain["optimizer"]["weight_decay"] = 0.1
    assert run_id(load(RunConfig, plain)) == before


@pytest.mark.parametrize("path", [("seed",), ("model", "d_model"), ("corpus", "name")])
def test_every_choice_is_part_of_the_id(path: tuple[str, ...]) -> None:
    other = {"seed": 18, "d_model": 32, "name": "other"}[path[-1]]
    tree = changed(path, lambda below, key: below.update({key: other}))
    assert run_id(load(RunConfig, tree)) != run_id(load(RunConfig, PLAIN))


def test_horizons_share_a_trunk_and_nothing_else_does(plain: dict) -> None:
    short = load(RunConfig, plain)
    plain["budget"]["tokens"] *= 2
    long = load(RunConfig, plain)
    plain["schedule"]["warmup_tokens"] = 1024
    other = load(RunConfig, plain)
    assert trunk_id(short) == trunk_id(long) != trunk_id(other)
    assert run_id(short) != run_id(long)


def test_a_changed_kind_drops_the_keys_of_the_old_one() -> None:
    merged = merge({"m": {"kind": "a", "x": 1}}, {"m": {"kind": "b"}})
    assert merged == {"m": {"kind": "b"}}


def test_optimizer_and_schedule_keep_their_keys_when_their_kind_changes() -> None:
    for name in ("optimizer", "schedule"):
        merged = merge({name: {"kind": "a", "x": 1, "y": 1}}, {name: {"kind": "b", "y": 2}})
        assert merged == {name: {"kind": "b", "x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2\n", "duplicate"),
        ("- 1\n", "not a mapping"),
        ("a: !!python/object/apply:os.system [touch x]\n", "cannot be read"),
        ("a: [1, 2\n", "cannot be read"),
    ],
)
def test_yaml_that_no_config_needs_is_refused(tmp_path: Any, text: str, why: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_yaml(file)


@pytest.mark.parametrize("key", ["name", "execution.data_root"])
def test_an_interpolation_is_refused_and_its_variable_not_read(tmp_path: Any, key: str) -> None:
    file = tmp_path / "leak.yaml"
    file.write_text(f"'{key}': ${{oc.env:HOME}}/data\n")
    with pytest.raises(ConfigError, match="interpolation") as raised:
        read_yaml(file)
    assert os.environ["HOME"] not in str(raised.value).replace(str(tmp_path), "")
    with pytest.raises(ConfigError, match="interpolation"):
        read_overrides([f"{key}=${{oc.env:HOME}}"])


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ladder' is not an override"):
        read_overrides(["ladder"])


@pytest.mark.parametrize(
    "word",
    [
        "optimizer..learning_rate=0.5",
        ".optimizer.learning_rate=0.5",
        "optimizer.learning_rate.=0.5",
        "optimizer[learning_rate]=0.5",
        "optimizer.[learning_rate]=0.5",
        "{optimizer}=0.5",
        " optimizer=0.5",
        "optimizer .learning_rate=0.5",
        "optimizer.\nlearning_rate=0.5",
        "=0.5",
        ".=0.5",
    ],
)
def test_an_override_whose_key_is_no_path_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="is not an override"):
        read_overrides([word])


@pytest.mark.parametrize(
    "words",
    [
        ("seed=1", "seed=2"),
        ("a.b=1", "a.b=1"),
        ("a=1", "a.b=1"),
        ("a.b=1", "a=1"),
        ("a={b: 1}", "a.b=2"),
        ("a.b=1", "a={c: 2}"),
        ("a.b=1", "a.b.c=1"),
    ],
)
def test_an_override_that_another_would_hide_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="overridden twice"):
        read_overrides(words)


@pytest.mark.parametrize("value", ["[", "[1,", "{a", "'", "!!python/none x", "*a", "[" * 100_000])
def test_an_override_that_is_no_yaml_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        read_overrides([f"budget.tokens={value}"])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), "010"),
        (("seed",), True),
        (("seed",), 2**63),
        (("corpus", "name"), 1e6),
        (("corpus", "name"), None),
        (("model", "tied"), "no"),
        (("model", "tied"), 1),
        (("precision",), True),
        (("optimizer", "beta1"), True),
        (("budget", "tokens"), 1e300),
    ],
)
def test_a_value_is_never_turned_into_another_type(path: tuple[str, ...], value: object) -> None:
    with pytest.raises(ConfigError, match=".".join(path)):
        load(RunConfig, changed(path, lambda below, key: below.update({key: value})))


@pytest.mark.parametrize("stage", [True, False, 1.0, "1", None])
def test_a_choice_among_numbers_takes_numbers_alone(stage: object) -> None:
    with pytest.raises(ConfigError, match="zero_stage"):
        load(ExecutionConfig, {"zero_stage": stage})


def test_zero_3_is_refused_on_several_ranks():
    ExecutionConfig(zero_stage=3)
    with pytest.raises(ValueError, match=r"zero_stage is 3 on 2 ranks.* choose zero_stage 2"):
        ExecutionConfig(zero_stage=3, ranks=2)
