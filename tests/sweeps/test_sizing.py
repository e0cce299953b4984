"""Every rung is reached by every architecture, and sizes are what they claim to be."""

import pytest

from models.accounting import total_parameters
from sweeps.architecture import read_architectures
from sweeps.rungs import RUNGS, find_rung
from sweeps.sizing import Shape, nominal_parameters, size_architecture
from trainer.schema import ConfigError

TOO_SMALL = {("10k", "m2_bert"), ("20k", "m2_bert")}
"""Learned places and two filters a layer, for encoders alone, are larger than these rungs."""
DEFAULT = ("10k", "20k", "31k", "68k", "97k")


@pytest.mark.parametrize("name", sorted(read_architectures()))
@pytest.mark.parametrize("rung", sorted(RUNGS))
def test_every_rung_is_matched_within_one_percent(rung: str, name: str) -> None:
    if (rung, name) in TOO_SMALL:
        pytest.skip("an encoder that is larger than the rung")
    vocab_size, seq_len = (257, 256) if RUNGS[rung].parameters else (50_304, 2048)
    fitted = size_architecture(
        name, read_architectures()[name], Shape(RUNGS[rung], vocab_size, seq_len)
    )
    built = total_parameters(fitted.model)
    assert built == fitted.parameters
    assert abs(built / nominal_parameters(RUNGS[rung], vocab_size) - 1) <= 0.01


@pytest.mark.parametrize("rung", DEFAULT)
def test_mamba_is_about_twice_as_deep_as_the_transformer(rung: str) -> None:
    fitted = size_architecture("mamba", read_architectures()["mamba"], Shape(RUNGS[rung], 257, 256))
    assert abs(fitted.model.n_layers - 2 * RUNGS[rung].n_layers) <= 1


@pytest.mark.parametrize(("rung", "layers", "width"), [("360M", 24, 1024), ("3B", 32, 2560)])
def test_rung_names_are_labels_of_the_transformers_shape(
    rung: str, layers: int, width: int
) -> None:
    model = size_architecture(
        "transformer", read_architectures()["transformer"], Shape(RUNGS[rung], 50_304, 2048)
    ).model
    assert (model.n_layers, model.d_model) == (layers, width)


@pytest.mark.parametrize(
    ("rung", "total"), [("125M", 123.6e6), ("360M", 355.1e6), ("1.3B", 1317.4e6), ("3B", 2650.8e6)]
)
def test_published_transformer_totals(rung: str, total: float) -> None:
    assert nominal_parameters(RUNGS[rung], 50_304) == pytest.approx(total, rel=1e-3)


def test_an_unknown_rung_is_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown rung '361M'; did you mean '360M'"):
        find_rung("361M")


def test_a_rung_out_of_reach_is_refused_with_the_closest_size() -> None:
    place = Shape(RUNGS["10k"], 257, 256)
    with pytest.raises(ConfigError, match="asks for 9780 parameters within 1%, but the closest"):
        size_architecture("m2_bert", read_architectures()["m2_bert"], place)


def test_decoders_reach_every_rung() -> None:
    decoders = {n for n, a in read_architectures().items() if a.model.get("form") != "encoder"}
    assert not decoders & {name for _, name in TOO_SMALL}
    assert decoders >= {"transformer", "mamba", "mamba2", "m2", "scout_mamba", "hybrid", "samba"}
