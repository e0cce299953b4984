"""Contrasts: known effects, coverage, pairing, noise, counting, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.effects.answer import answer
from analysis.effects.contrasts import Contrast, contrasts
from analysis.effects.seed_noise import Detectable, seed_noise
from analysis.tables.run_table import final
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal
from tests.analysis.synthetic_study import Study, write


@pytest.fixture(scope="module")
def exact(noise_free):
    return final(noise_free)


def noisy(table, generator, trunk_sd, point_sd):
    """The table with noise that the points of one trunk share, and noise of their own."""
    names = table.rows["trunk_id"].unique()
    shifts = dict(zip(names, generator.normal(0.0, trunk_sd, len(names)), strict=True))
    noise = table.rows["trunk_id"].map(shifts) + generator.normal(0.0, point_sd, len(table.rows))
    loss = table.rows["loss_nats"] * np.exp(noise.to_numpy(dtype=float))
    return replace(table, rows=table.rows.assign(loss_nats=loss))


def at_equal_size(table, study):
    """The table with both arms' losses taken at the baseline's size, so effects are exact."""
    rows = table.rows
    sign = np.where(rows["evaluation_set"] == "prose", 1.0, -1.5)
    effect = study.architecture_effect * (rows["architecture"] == study.architectures[1])
    effect = effect + sign * study.corpus_effect * (rows["corpus"] == study.corpora[1])
    loss = study.loss(rows["nominal_parameters"], rows["tokens"]) * np.exp(effect)
    return replace(table, rows=rows.assign(loss_nats=loss))


def test_exact_losses_give_the_exact_effects(exact, study):
    found = answer(at_equal_size(exact, study), "prose")
    assert found.corpus[0].effect.estimate == pytest.approx(study.corpus_effect, abs=1e-12)
    assert found.architecture[0].effect.estimate == pytest.approx(
        study.architecture_effect, abs=1e-12
    )
    assert found.arms[0].ratio.estimate == pytest.approx(0.08 / 0.015, rel=1e-9)
    assert found.arms[0].interaction.estimate == pytest.approx(0.0, abs=1e-12)


def test_intervals_of_effects_cover_the_truth(exact, study):
    table = at_equal_size(exact, study)
    table = replace(table, rows=table.rows[table.rows["evaluation_set"] == "prose"])
    draws, hits = 100, {"corpus": 0, "architecture": 0}
    truth = {"corpus": study.corpus_effect, "architecture": study.architecture_effect}
    for seed in range(draws):
        drawn = noisy(table, np.random.default_rng(seed), 0.004, 0.001)
        for factor, value in truth.items():
            effect = contrasts(drawn, factor, "prose")[0].effect
            hits[factor] += effect.low <= value <= effect.high
    for found in hits.values():
        assert 0.89 <= found / draws <= 0.99


def test_an_effect_of_zero_is_rarely_called_one(exact, study):
    table = at_equal_size(exact, replace(study, architecture_effect=0.0))
    table = replace(table, rows=table.rows[table.rows["evaluation_set"] == "prose"])
    draws, alarms = 100, 0
    for seed in range(draws):
        drawn = noisy(table, np.random.default_rng(1000 + seed), 0.004, 0.001)
        alarms += contrasts(drawn, "architecture", "prose")[0].effect.excludes(0.0)
    assert 0.0 < alarms / draws <= 0.11


def test_an_interaction_is_found(tmp_path):
    study = Study(interaction=0.03, seed_sd=0.001, point_sd=0.0005, seeds={})
    root = write(study, tmp_path / "crossed", np.random.default_rng(0))
    found = answer(final(load(root)), "prose").arms[0].interaction
    assert found.low < 0.03 < found.high
    assert found.excludes(0.0)


def test_equal_certificates_make_an_architecture_contrast_paired(sweep):
    found = contrasts(final(load(sweep)), "architecture", "prose")[0]
    assert found.pairs["same_samples"].all()
    assert found.matching.startswith("paired")


def test_other_certificates_make_it_not_paired(tmp_path):
    root = write(
        Study(certificate_of="run", seeds={}), tmp_path / "other", np.random.default_rng(0)
    )
    found = contrasts(final(load(root)), "architecture", "prose")[0]
    assert not found.pairs["same_samples"].any()
    assert found.matching == "not paired: 30 of 30 pairs saw other samples"


def test_a_corpus_contrast_says_that_it_is_not_paired_by_sample(sweep):
    assert "not paired by sample" in contrasts(final(load(sweep)), "corpus", "prose")[0].matching


def test_pairs_agree_in_size_tokens_and_seed(sweep):
    table = final(load(sweep))
    pairs = contrasts(table, "architecture", "prose")[0].pairs
    assert len(pairs) == len(table.runs) / 2
    assert not pairs.duplicated(["corpus", "rung", "tokens", "seed"]).any()


def test_each_level_is_compared_with_the_first(tmp_path):
    study = Study(architectures=("transformer", "mamba", "scout"), seeds={})
    root = write(study, tmp_path / "three", np.random.default_rng(0))
    found = contrasts(final(load(root)), "architecture", "prose")
    assert [(each.baseline, each.other) for each in found] == [
        ("transformer", "mamba"),
        ("transformer", "scout"),
    ]


def test_noise_between_seeds_is_recovered(exact):
    table = replace(exact, rows=exact.rows[exact.rows["evaluation_set"] == "prose"])
    found = [
        seed_noise(noisy(table, np.random.default_rng(seed), 0.004, 0.0).rows) for seed in range(60)
    ]
    variances = [each.sd.estimate**2 for each in found]
    assert np.sqrt(np.mean(variances)) == pytest.approx(0.004, rel=0.2)
    assert np.mean([each.sd.low <= 0.004 <= each.sd.high for each in found]) > 0.85


def test_horizons_of_a_trunk_do_not_add_degrees_of_freedom(sweep, study):
    rows = final(load(sweep)).rows
    found = seed_noise(rows[rows["evaluation_set"] == "prose"])
    assert found.freedom == len(study.architectures) * len(study.corpora)


def test_a_study_without_second_seeds_says_what_its_detectable_difference_rests_on(tmp_path):
    root = write(Study(seeds={}), tmp_path / "single", np.random.default_rng(0))
    found = answer(final(load(root)), "prose")
    assert found.noise.code == "R-SEED"
    assert "no cell has two seeds" in found.detectable["architecture"].basis


def test_the_detectable_difference_is_found_with_the_power_it_claims(exact, study):
    base = replace(exact, rows=exact.rows[exact.rows["evaluation_set"] == "prose"])
    # With the true noise known the claim can be tested; each rung weighs by its number of seeds.
    first = noisy(at_equal_size(base, study), np.random.default_rng(0), 0.004, 0.0)
    claimed = answer(first, "prose").detectable["architecture"]
    noise = seed_noise(first.rows).sd.estimate
    effect = claimed.value * 0.004 / noise
    table = at_equal_size(base, replace(study, architecture_effect=effect))
    found = [
        contrasts(
            noisy(table, np.random.default_rng(seed), 0.004, 0.0), "architecture", "prose"
        )[0].effect.excludes(0.0)
        for seed in range(80)
    ]  # fmt: skip
    assert isinstance(claimed, Detectable)
    assert 0.65 <= np.mean(found) <= 0.92


def test_equal_flops_interpolate_between_horizons(exact, study):
    found = answer(exact, "prose").arms[0].flops["flops"]
    pairs = found.pairs
    baseline = (
        pairs["tokens"] * study.flops_factor["mamba"] * 1.02 / study.flops_factor["transformer"]
    )
    nominal = pairs["rung"].map(study.sizes)
    expected = study.architecture_effect + np.log(
        study.loss(1.02 * nominal, pairs["tokens"]) / study.loss(nominal, baseline)
    )
    np.testing.assert_allclose(pairs["difference"], expected, atol=2e-4)


def test_equal_flops_do_not_leave_the_horizons(tmp_path):
    study = Study(flops_factor={"transformer": 6.0, "mamba": 60.0}, seeds={})
    root = write(study, tmp_path / "apart", np.random.default_rng(0))
    found = answer(final(load(root)), "prose").arms[0].flops["flops"]
    assert isinstance(found, Refusal)
    assert found.code == "R-REACH"


def test_a_sign_that_depends_on_counting_is_noticed(tmp_path):
    study = Study(
        flops_factor={"transformer": 6.0, "mamba": 9.5}, seed_sd=0.0002, point_sd=0.0001,
    )  # fmt: skip
    root = write(study, tmp_path / "costly", np.random.default_rng(0))
    found = answer(final(load(root)), "prose")
    assert found.architecture[0].effect.estimate < 0 < found.arms[0].flops["flops"].effect.estimate
    assert found.arms[0].sign_changes


def test_one_architecture_gives_refusals_and_a_corpus_effect(tmp_path):
    root = write(Study(architectures=("mamba",)), tmp_path / "one", np.random.default_rng(0))
    found = answer(final(load(root)), "prose")
    assert isinstance(found.corpus[0], Contrast)
    for refused in (
        found.architecture[0],
        found.arms[0].interaction,
        found.arms[0].ratio,
        found.arms[0].flops["flops"],
    ):
        assert refused.code == "R-FACTOR"


def test_one_size_is_refused_an_interval(tmp_path):
    study = Study(sizes={"r9k": 9e3}, seeds={})
    root = write(study, tmp_path / "smoke", np.random.default_rng(0))
    assert contrasts(final(load(root)), "corpus", "prose")[0].code == "R-PAIRS"


def test_two_runs_at_one_place_are_refused(exact):
    doubled = exact.rows.assign(architecture="transformer", corpus="web")
    table = replace(exact, rows=doubled)
    assert contrasts(table, "corpus", "prose")[0].code == "R-AMBIGUOUS"


def test_evaluation_sets_of_different_length_are_refused(exact):
    rows = exact.rows.copy()
    rows.loc[rows.index[0], "targets"] += 1
    found = contrasts(replace(exact, rows=rows), "corpus", rows["evaluation_set"].iloc[0])[0]
    assert found.code == "R-EVAL"
