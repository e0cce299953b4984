"""An encoder of images by patches (Dosovitskiy et al. 2020, section 3.1), over any mixer.

Patches stand in raster order, so that one-dimensional mixers see rows one after the other. Changed:
classes are read off the mean of all patches (there, appendix D.3), not off a token of its own.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.backbone import BackboneConfig, Stack, initialise
from models.parts.layers import Embedding, Linear
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class PatchConfig:
    """An encoder of images, and what it is asked of them.

    Attributes:
        backbone: the encoder; `learned_positions` is the most patches of an image, and its
            vocabulary is not read.
        patch: side of a patch in pixels, which divides the sides of the images.
        channels: of each pixel.
        classes: to tell apart.
    """

    backbone: BackboneConfig
    patch: int
    channels: int
    classes: int

    def __post_init__(self) -> None:
        for name in ("patch", "channels", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")
        if self.backbone.form != "encoder" or self.backbone.encoder is not None:
            raise ValueError(
                "patches are read by an encoder alone, but backbone is a decoder or has a second "
                "stack; set backbone.form to encoder and leave backbone.encoder out"
            )
        if self.backbone.learned_positions is None:
            raise ValueError(
                "patches need places, but backbone.learned_positions is not given; set it to the "
                "most patches of an image"
            )

    @property
    def most_patches(self) -> int:
        """Patches of the largest image."""
        return self.backbone.learned_positions or 0


class PatchBackbone(Stack):
    """Images to scores of classes: patches, mapped and placed; blocks; their mean; a map."""

    def __init__(self, config: PatchConfig) -> None:
        backbone = config.backbone
        super().__init__(backbone.layers(), backbone, backbone.form)
        self.config, D = config, backbone.d_model
        self.embedding = Linear(config.channels * config.patch**2, D, bias=True)
        self.places = Embedding(config.most_patches, D, backbone.embedding_std)
        self.classifier = Linear(D, config.classes, bias=True)

    def forward(self, images: Float[Tensor, "B C height width"]) -> Float[Tensor, "B classes"]:
        """Scores of the classes of each image, before a softmax.

        Raises:
            ValueError: patches do not divide the images, or there are more than places.
        """
        x = self.embedding(self.cut(images))
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        return self.classifier(self.run(x, WholeSequence(_one_document(x))).mean(dim=1))

    def cut(self, images: Float[Tensor, "B C height width"]) -> Float[Tensor, "B L patch"]:
        """The patches of each image in raster order, each with its channels, rows and columns."""
        side, sides = self.config.patch, tuple(images.shape[2:])
        rows, columns = (length // side for length in sides)
        if (rows * side, columns * side) != sides:
            raise ValueError(
                f"images of {sides[0]} x {sides[1]} pixels are no whole patches of {side}; crop "
                "them, or take a patch that divides both sides"
            )
        if rows * columns > self.config.most_patches:
            raise ValueError(
                f"images have {rows * columns} patches, but there are {self.config.most_patches} "
                "places; raise backbone.learned_positions"
            )
        split = images.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def build_patch_backbone(config: PatchConfig, seed: int) -> PatchBackbone:
    """Make an encoder whose initial weights depend on (seed, parameter name) alone."""
    with torch.device("meta"):
        backbone = PatchBackbone(config)
    backbone.to_empty(device="cpu")
    initialise(backbone, seed)
    return backbone


def _one_document(x: Float[Tensor, "B L D"]) -> Int[Tensor, "B L"]:
    return torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
