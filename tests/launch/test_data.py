"""Checking a dataset from the command line."""

from pathlib import Path

import pytest

from data_pipelines.config import DatasetConfig, SourceConfig
from data_pipelines.manifest import read_manifest
from launch.data import DataError, verify_data
from tests.trainer.study import build_tiny
from trainer.exit_codes import ExitCode


def test_a_damaged_byte_is_found_and_named(tmp_path: Path) -> None:
    root = build_tiny(tmp_path)
    config = DatasetConfig("tiny", SourceConfig("jsonl", (str(root / "tiny.jsonl"),)))
    verify_data(config, root)
    shard = root / "tiny" / read_manifest(root / "tiny").streams[0].shards[0].zip_name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=shard.name) as raised:
        verify_data(config, root)
    assert raised.value.exit_code == ExitCode.BAD_DATA
