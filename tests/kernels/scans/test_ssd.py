"""The chunked SSD against float64 loops, in outputs, states and every gradient."""

import numpy as np
import pytest
import torch

from kernels.dispatch import Path
from kernels.scans import ssd as module
from kernels.scans.bidirectional_ssd import bidirectional_ssd
from kernels.scans.selective_scan import selective_scan_reference
from kernels.scans.ssd import ssd, ssd_reference
from tests.kernels.scans.ssd_cases import (
    INPUTS,
    assert_matches_oracle,
    differentiate,
    make_documents,
    make_inputs,
    rounded,
    weights,
)
from tests.oracles import ssd as oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 197])
def test_chunks_match_the_loop_in_outputs_and_every_gradient(length, ragged, dtype):
    assert_matches_oracle(ssd, make_inputs(length), make_documents(ragged, 2, length), dtype)


@pytest.mark.parametrize("ragged", [False, True])
def test_reference_matches_the_loop(ragged):
    documents = make_documents(ragged, 2, 33)
    assert_matches_oracle(ssd_reference, make_inputs(33), documents, torch.float64)


@pytest.mark.parametrize(
    ("heads", "width", "groups", "states"),
    [(1, 1, 1, 1), (4, 3, 4, 5), (6, 2, 2, 16), (4, 7, 1, 3), (3, 16, 1, 33)],
)
def test_any_heads_groups_widths_and_states_work(heads, width, groups, states):
    inputs = make_inputs(70, heads, width, groups, states, batch=3)
    assert_matches_oracle(ssd, inputs, make_documents(True, 3, 70), torch.float32)


def test_oracle_gradients_match_finite_differences():
    inputs = make_inputs(6, heads=2)
    documents = make_documents(True, 2, 6)
    d_outputs, d_final = (x.astype(np.float64) for x in weights(inputs, 6))

    def objective(changed):
        outputs, states = oracle.scan(changed, documents)
        return (outputs * d_outputs).sum() + (states[:, -1] * d_final).sum()

    expected = oracle.gradients(inputs, documents, d_outputs, d_final)
    generator = np.random.default_rng(0)
    for name in INPUTS:
        direction = generator.normal(size=inputs[name].shape)
        up, down = (
            objective({**inputs, name: inputs[name] + step * direction}) for step in (1e-5, -1e-5)
        )
        assert (up - down) / 2e-5 == pytest.approx((expected[name] * direction).sum(), rel=1e-6)


def test_chunk_length_does_not_matter(monkeypatch):
    inputs, _ = rounded(make_inputs(150), torch.float64)
    documents = torch.from_numpy(make_documents(True, 2, 150))
    d_outputs, d_final = weights(inputs, 150)
    runs = []
    for chunk in (150, 1, 7, 16, 64):
        monkeypatch.setattr(module, "CHUNK", chunk)
        runs.append(differentiate(ssd, inputs, documents, d_outputs, d_final))
    for result, gradients in runs[1:]:
        pairs = [*zip(result, runs[0][0], strict=True)]
        pairs += [(gradients[name], runs[0][1][name]) for name in INPUTS]
        assert all((x - y).norm() <= 1e-12 * y.norm() for x, y in pairs)


@pytest.mark.parametrize(("heads", "width", "groups"), [(7, 64, 1), (12, 60, 2), (2, 300, 1)])
def test_heads_of_several_tasks_share_what_they_share(heads, width, groups):
    inputs = make_inputs(70, heads, width, groups)
    assert_matches_oracle(ssd, inputs, make_documents(True, 2, 70), torch.float32)


def test_the_number_of_threads_does_not_matter():
    inputs, _ = rounded(make_inputs(150, heads=12, width=60, groups=2), torch.float32)
    documents = torch.from_numpy(make_documents(True, 2, 150))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(differentiate(ssd, inputs, documents, *weights(inputs, 150)))
    finally:
        torch.set_num_threads(before)
    for result, gradients in runs[1:]:
        pairs = [*zip(result, runs[0][0], strict=True)]
        pairs += [(gradients[name], runs[0][1][name]) for name in INPUTS]
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_chunks_match_the_loop(monkeypatch, ragged, dtype):
    monkeypatch.setattr(module, "path_of", lambda _: Path.REFERENCE)
    assert_matches_oracle(ssd, make_inputs(100), make_documents(ragged, 2, 100), dtype)


def test_strong_decays_and_long_steps_match_the_loop():
    inputs = make_inputs(300, dt=(0.1, 20.0))
    inputs["A"][:] = -16.0
    assert_matches_oracle(ssd, inputs, make_documents(False, 2, 300), torch.float32)


def test_long_strongly_decaying_sequences_stay_finite():
    inputs, _ = rounded(
        make_inputs(4096, heads=2, width=4, groups=1, dt=(1e-2, 20.0)), torch.float32
    )
    inputs["A"][:] = -16.0
    documents = torch.zeros(2, 4096, dtype=torch.int32)
    result, gradients = differentiate(ssd, inputs, documents, *weights(inputs, 4096))
    assert all(x.isfinite().all() for x in (*result, *gradients.values()))


def test_gradients_pass_torchs_own_check():
    inputs, _ = rounded(make_inputs(9, heads=2, width=2, groups=1, states=2), torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    documents = torch.from_numpy(make_documents(True, 2, 9))
    assert torch.autograd.gradcheck(lambda *x: tuple(ssd(*x, documents)), leaves)


def test_log_decay_gradient_obeys_its_identity():
    inputs, _ = rounded(make_inputs(90, groups=4), torch.float64)
    documents = torch.zeros(2, 90, dtype=torch.int32)
    d_outputs, d_final = weights(inputs, 90)
    result, gradients = differentiate(ssd, inputs, documents, d_outputs, d_final)
    outer = (inputs["C"] * gradients["C"] - inputs["B"] * gradients["B"]).sum(-1)
    at_end = (result.final * torch.as_tensor(d_final)).sum((2, 3))
    by_log = outer.flip(1).cumsum(1).flip(1) + at_end[:, None]
    wanted = (by_log * inputs["dt"]).sum((0, 1))
    assert torch.allclose(gradients["A"], wanted, rtol=1e-9)


def test_equal_rates_and_steps_make_mambas_scan_the_same():
    inputs, _ = rounded(make_inputs(70, groups=1), torch.float64)
    documents = torch.from_numpy(make_documents(True, 2, 70))
    _, _, H, P = inputs["values"].shape
    tied = {
        "values": inputs["values"].flatten(2),
        "dt": inputs["dt"].repeat_interleave(P, dim=2),
        "A": inputs["A"].repeat_interleave(P)[:, None].expand(H * P, 3),
        "B": inputs["B"][:, :, 0],
        "C": inputs["C"][:, :, 0],
        "initial": inputs["initial"].flatten(1, 2),
    }
    wanted = selective_scan_reference(**tied, documents=documents)
    got = ssd(**inputs, documents=documents)
    assert torch.allclose(got.outputs.flatten(2), wanted.outputs, rtol=1e-10, atol=1e-12)
    assert torch.allclose(got.final.flatten(1, 2), wanted.final, rtol=1e-10, atol=1e-12)


def test_without_decay_it_is_cumulative_linear_attention():
    inputs, _ = rounded(make_inputs(100, groups=4), torch.float64)
    inputs["A"][:] = 0.0
    v, k, q = inputs["values"] * inputs["dt"][..., None], inputs["B"], inputs["C"]
    sums = torch.einsum("blhp,blhn->blhpn", v, k).cumsum(1) + inputs["initial"][:, None]
    wanted = torch.einsum("blhpn,blhn->blhp", sums, q)
    assert torch.allclose(ssd(**inputs).outputs, wanted, rtol=1e-10, atol=1e-12)


def test_immense_decay_leaves_each_token_alone():
    inputs, _ = rounded(make_inputs(100, groups=4), torch.float64)
    inputs["A"][:] = -1e9
    each = inputs["dt"] * (inputs["B"] * inputs["C"]).sum(-1)
    wanted = each[..., None] * inputs["values"]
    assert torch.allclose(ssd(**inputs).outputs, wanted, rtol=1e-12, atol=1e-12)


def test_a_step_of_zero_leaves_the_state_as_it_is():
    inputs, _ = rounded(make_inputs(150), torch.float32)
    inputs["dt"][:] = 0.0
    assert torch.equal(ssd(**inputs).final, inputs["initial"])


def test_matrix_read_off_equals_the_entries():
    inputs, exact = rounded(make_inputs(90, batch=1, width=90), torch.float64)
    documents = make_documents(True, 1, 90)
    inputs["values"] = torch.eye(90).double()[None, :, None].expand(1, 90, 4, 90)
    ids = torch.from_numpy(documents)
    got = ssd(**{**inputs, "initial": None}, documents=ids).outputs[0].permute(1, 0, 2)
    parts = (exact["dt"][0], exact["A"], exact["B"][0], exact["C"][0])
    wanted = oracle.matrix(*parts, documents[0])
    assert np.abs(got.numpy() - wanted).max() < 1e-12 * np.abs(wanted).max()


@pytest.mark.parametrize("lengths", [(1,), (70,), (20, 1, 1, 40), (5, 30)])
def test_two_way_scan_gives_both_triangles_of_a_quasiseparable_matrix(lengths):
    L, padding = 70, 70 - sum(lengths)
    ids = np.repeat([*range(len(lengths)), -1], [*lengths, padding]).astype(np.int32)[None]
    generator = np.random.default_rng(3)
    dt = generator.uniform(0.01, 0.5, size=(1, L, 2, 4))
    A = -generator.uniform(0.1, 4.0, size=4)
    B, C = generator.normal(size=(2, 1, L, 2, 2, 3))
    units = torch.eye(L).double()[None, :, None].expand(1, L, 4, L)
    tensors = (torch.from_numpy(x) for x in (dt, A, B, C, ids))
    got = bidirectional_ssd(units, *tensors)[0].permute(1, 0, 2).numpy()
    wanted = oracle.quasiseparable(dt[0], A, B[0], C[0], np.zeros((L, 4)), ids[0])
    assert np.abs(got - wanted).max() < 1e-12 * np.abs(wanted).max()
