"""Every named architecture as a whole: memory, first loss, initial values under the engine."""

import dataclasses
import math

import pytest
import torch

from models.activations import activations, counting
from models.backbone import BackboneConfig, build_backbone, undecayed
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.grammar import Experiment
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture
from tests.trainer import study
from trainer.engine import Engine, prepare_process
from trainer.objective import total_nats

VOCAB, LENGTH, ROWS = 258, 96, 2


def fitted(name: str) -> BackboneConfig:
    place = Shape(RUNGS["68k"], VOCAB, LENGTH)
    return size_architecture(name, read_architectures()[name], place).model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def whole() -> WholeSequence:
    return WholeSequence(torch.zeros(ROWS, LENGTH, dtype=torch.int32))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", sorted(read_architectures()))
def test_kept_bytes_are_within_fifteen_percent_of_the_predicted(
    name: str, recompute: bool, tokens: torch.Tensor
) -> None:
    config = fitted(name)
    backbone = build_backbone(config, 1)
    backbone.recompute = recompute
    with counting(backbone.parameters()) as kept:
        loss = total_nats(backbone, backbone(tokens, whole()), tokens)
    assert loss.requires_grad
    predicted = activations(config, ROWS, LENGTH).kept(recompute=recompute)
    assert kept.bytes == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("name", sorted(read_architectures()))
def test_the_first_loss_is_near_that_of_a_uniform_guess(name: str, tokens: torch.Tensor) -> None:
    backbone = build_backbone(fitted(name), 1)
    # The other row's tokens: a tied head leans to a token's own id before it has learnt anything.
    loss = total_nats(backbone, backbone(tokens, whole()), tokens.flip(0)) / tokens.numel()
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(read_architectures()))
def test_the_engine_leaves_initial_values_and_their_dtype_alone(name: str, tmp_path) -> None:
    made = study.make(tmp_path)
    model = dataclasses.replace(fitted(name), form="decoder", vocab_size=VOCAB)
    if read_architectures()[name].model.get("form") == "encoder":
        run = dataclasses.replace(
            made.run, model=dataclasses.replace(model, form="encoder"), objective="masked_lm"
        )
    else:
        run = dataclasses.replace(made.run, model=model)
    experiment = Experiment(
        dataclasses.replace(run, precision="bf16"), made.execution, made.evaluation
    )
    wanted = {n: p.clone() for n, p in build_backbone(run.model, 3).named_parameters()}
    prepare_process(experiment.execution)
    engine = Engine(build_backbone(run.model, 3), experiment.run, experiment.execution)
    marked = undecayed(engine.backbone)
    for parameter_name, parameter in engine.backbone.named_parameters():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, wanted[parameter_name])
        if parameter_name.rpartition(".")[2] in ("A_log", "D", "dt_bias", "Lambda"):
            assert parameter_name in marked
    engine.close()
