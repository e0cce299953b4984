"""Parameter totals of published SCOUTs and of the Transformers they are compared with.

Those of Mamba, Mamba-2, M2-BERT and Hyena are held where their mixers are tested.
"""

from dataclasses import dataclass

import pytest

from models.accounting import account, total_parameters
from models.backbone import BackboneConfig, BlockConfig
from models.channel import SwiGLUConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.mixers.softmax.scout import ScoutConfig
from models.mixers.softmax.window import WindowConfig

VOCABULARY = 32_000


@dataclass(frozen=True)
class Preset:
    """A released SCOUT: its sizes, and millions of parameters as tabled (SCOUT card, A.4)."""

    mixer: MambaConfig | WindowConfig
    d_model: int
    d_hidden: int
    n_blocks: int
    n_heads: int
    tied: bool
    millions: float

    def backbone(self) -> BackboneConfig:
        """Each of its blocks is two of ours: a mixer and an MLP, attention and an MLP."""
        attention = ScoutConfig(self.n_heads, every=10, qk_norm=False)
        channel = SwiGLUConfig(self.d_hidden)
        return BackboneConfig(
            blocks={"m": BlockConfig(self.mixer, channel), "s": BlockConfig(attention, channel)},
            pattern="m s",
            n_layers=2 * self.n_blocks,
            d_model=self.d_model,
            vocab_size=VOCABULARY,
            tied=self.tied,
        )

    def mixer_parameters(self) -> int:
        """The card's formula of the local mixer."""
        d, inner, N, R = self.d_model, 2 * self.d_model, 16, 128
        if isinstance(self.mixer, WindowConfig):
            return 4 * d**2
        convolution, low_rank = 4 * inner + inner, inner * (R + 2 * N) + R * inner + inner
        return 2 * d * inner + convolution + low_rank + N * inner + inner + inner * d

    def formula(self) -> int:
        """The card's formula of the whole: attention, two MLPs, four norms; embeddings; a norm."""
        d = self.d_model
        block = self.mixer_parameters() + 4 * d**2 + 2 * 3 * d * self.d_hidden + 4 * d
        return self.n_blocks * block + d + VOCABULARY * d * (1 if self.tied else 2)


def sliding(n_heads: int) -> WindowConfig:
    return WindowConfig(n_heads, window=1024, qk_norm=False)


MAMBA = MambaConfig(d_state=16, d_conv=4, expand=2, dt_rank=128)
SCOUTS = {
    "scout_mamba_430m": Preset(MAMBA, 1024, 2816, 14, 16, True, 430.77),
    "scout_swa_470m": Preset(sliding(16), 1024, 2816, 17, 16, True, 469.57),
    "scout_mamba_1.59b": Preset(MAMBA, 2048, 5632, 13, 32, False, 1592.68),
    "scout_swa_1.57b": Preset(sliding(32), 2048, 5632, 14, 32, False, 1569.84),
}
TRANSFORMERS = {
    "125M": (12, 768, 12, 2048, (85.0, 109.5, 134.1, 123.6)),
    "350M": (24, 1024, 16, 2752, (303.6, 336.4, 369.2, 355.1)),
    "760M": (24, 1536, 16, 4096, (679.6, 728.7, 777.9, 756.8)),
    "1.3B": (24, 2048, 32, 5504, (1214.4, 1279.9, 1345.4, 1317.4)),
    "2.8B": (32, 2560, 32, 6848, (2522.0, 2603.9, 2685.8, 2650.8)),
}
"""Layers, width, heads, inner width; millions of parameters outside embeddings, with 32,000 ids
tied and untied, and with 50,304 ids tied (Transformer card, D.2)."""


def transformer(rung: str, vocab_size: int = VOCABULARY, tied: bool = True) -> BackboneConfig:
    n_layers, d_model, n_heads, d_hidden, _ = TRANSFORMERS[rung]
    block = BlockConfig(AttentionConfig(n_heads), SwiGLUConfig(d_hidden))
    return BackboneConfig({"a": block}, "a", n_layers, d_model, vocab_size, tied=tied)


def millions(count: int, digits: int) -> float:
    return round(count / 1e6, digits)


@pytest.mark.parametrize("name", SCOUTS)
def test_scouts_have_the_published_millions_of_parameters(name: str) -> None:
    preset = SCOUTS[name]
    assert millions(total_parameters(preset.backbone()), 2) == preset.millions


@pytest.mark.parametrize("name", SCOUTS)
def test_scouts_have_the_parameters_of_the_published_formula(name: str) -> None:
    preset = SCOUTS[name]
    assert total_parameters(preset.backbone()) == preset.formula()


@pytest.mark.parametrize("rung", TRANSFORMERS)
def test_transformers_have_the_tabled_millions_of_parameters(rung: str) -> None:
    counted = account(transformer(rung), seq_len=1).non_embedding_parameters
    totals = (
        total_parameters(transformer(rung)),
        total_parameters(transformer(rung, tied=False)),
        total_parameters(transformer(rung, vocab_size=50_304)),
    )
    assert tuple(millions(n, 1) for n in (counted, *totals)) == TRANSFORMERS[rung][-1]


@pytest.mark.parametrize("rung", TRANSFORMERS)
def test_transformers_have_the_parameters_of_the_formula(rung: str) -> None:
    n_layers, d, n_heads, f, _ = TRANSFORMERS[rung]
    layer = 4 * d**2 + 3 * d * f + 2 * d + 2 * (d // n_heads)
    assert total_parameters(transformer(rung)) == n_layers * layer + d + VOCABULARY * d


@pytest.mark.parametrize("rung", TRANSFORMERS)
def test_inner_widths_are_eight_thirds_in_steps_of_64(rung: str) -> None:
    _, d_model, _, d_hidden, _ = TRANSFORMERS[rung]
    assert d_hidden == -(-8 * d_model // (3 * 64)) * 64
