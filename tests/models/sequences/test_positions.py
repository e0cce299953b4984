"""Positions and document ids."""

from data_pipelines import batch
from models.sequences import positions


def test_padding_is_the_same_id_in_batches_and_in_models():
    # models/ may not import data_pipelines/, so each holds the number.
    assert positions.PADDING == batch.PADDING
