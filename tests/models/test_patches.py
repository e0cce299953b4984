"""The encoder of patches: what it reads, what it counts, and that it learns with any mixer."""

import pytest
import torch
import torch.nn.functional as F

from models.backbone import BackboneConfig, BlockConfig
from models.channel import SwiGLUConfig
from models.mixer import MixerConfig
from models.mixers.convolution.monarch import MonarchConfig
from models.mixers.recurrent.hydra import HydraConfig
from models.mixers.softmax.attention import AttentionConfig
from models.patches import PatchBackbone, PatchConfig, build_patch_backbone

MIXERS: dict[str, MixerConfig] = {
    "attention": AttentionConfig(n_heads=2, initial_std=None),
    "hydra": HydraConfig(d_state=8, head_dim=16),
    "m2": MonarchConfig(max_len=16, filter_hidden=16),
}
SIDE, PATCH, WIDTH = 16, 4, 32


def config(mixer: MixerConfig, channels: int = 1, classes: int = 4, **fields) -> PatchConfig:
    channel = SwiGLUConfig(64, initial_std=None)
    wanted = {"form": "encoder", "learned_positions": (SIDE // PATCH) ** 2, **fields}
    blocks = {"b": BlockConfig(mixer, channel)}
    backbone = BackboneConfig(blocks, "b", 2, WIDTH, vocab_size=1, **wanted)
    return PatchConfig(backbone, PATCH, channels, classes)


def encoder(name: str, **fields) -> PatchBackbone:
    return build_patch_backbone(config(MIXERS[name], **fields), seed=17)


def bars(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of a bar that lies, stands, falls or rises, at any place; and which."""
    generator = torch.Generator().manual_seed(5)
    down, across = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    distances = torch.stack([down - 8, across - 8, down - across, down + across - 15])
    kinds = torch.arange(images) % 4
    shifts = torch.randint(-4, 5, (images, 1, 1), generator=generator)
    drawn = ((distances[kinds] - shifts).abs() <= 1).float()
    return (drawn + 0.3 * torch.randn(drawn.shape, generator=generator)).unsqueeze(1), kinds


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("sides", [(16, 16), (8, 12)])
def test_each_image_gets_a_score_of_each_class(name: str, sides: tuple[int, int]) -> None:
    images = torch.randn(3, 2, *sides)
    assert encoder(name, channels=2, classes=5)(images).shape == (3, 5)


def test_patches_stand_in_raster_order() -> None:
    images = torch.randn(2, 3, 8, 12)
    cut = encoder("attention", channels=3).cut(images)
    assert cut.shape == (2, 6, 48)
    for index in range(6):
        row, column = divmod(index, 3)
        patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(cut[:, index], patch.flatten(1))


@pytest.mark.parametrize("name", MIXERS)
def test_thirty_steps_learn_thirty_two_images(name: str) -> None:
    backbone, (images, kinds) = encoder(name), bars(32)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(backbone(images), kinds).backward()
        optimizer.step()
    scores = backbone(images)
    assert torch.equal(scores.argmax(dim=1), kinds)
    assert F.cross_entropy(scores, kinds) < 0.1


@pytest.mark.parametrize("name", MIXERS)
def test_the_first_patch_hears_of_the_last_and_the_last_of_the_first(name: str) -> None:
    backbone, images = encoder(name), torch.randn(1, 1, SIDE, SIDE)
    heard = []
    backbone.norm.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    changed = images.clone()
    changed[..., :PATCH, :PATCH] += 1
    other = images.clone()
    other[..., -PATCH:, -PATCH:] += 1
    for each in (images, changed, other):
        backbone(each)
    assert not torch.equal(heard[0][:, -1], heard[1][:, -1])
    assert not torch.equal(heard[0][:, 0], heard[2][:, 0])


@pytest.mark.parametrize("name", MIXERS)
def test_parameters_are_those_of_blocks_maps_and_places(name: str) -> None:
    backbone = encoder(name, channels=3, classes=5)
    blocks = sum(p.numel() for p in backbone.layers.parameters())
    outside = (3 * PATCH**2 + 1) * WIDTH + 16 * WIDTH + WIDTH + (WIDTH + 1) * 5
    assert sum(p.numel() for p in backbone.parameters()) == blocks + outside


def test_attention_blocks_have_the_parameters_of_the_formula() -> None:
    total = sum(p.numel() for p in encoder("attention").layers.parameters())
    assert total == 2 * (4 * WIDTH**2 + 2 * WIDTH // 2 + 3 * WIDTH * 64 + 2 * WIDTH)


def test_equal_seeds_make_equal_encoders() -> None:
    images = torch.randn(2, 1, SIDE, SIDE)
    assert torch.equal(encoder("hydra")(images), encoder("hydra")(images))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"form": "decoder"}, "set backbone.form to encoder"),
        ({"learned_positions": None}, "backbone.learned_positions is not given"),
    ],
)
def test_backbones_that_cannot_read_patches_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(MIXERS["attention"], **fields)


@pytest.mark.parametrize(
    ("sides", "said"), [((16, 18), "no whole patches of 4"), ((16, 20), "there are 16 places")]
)
def test_images_that_do_not_fit_are_refused(sides: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoder("attention")(torch.randn(1, 1, *sides))
