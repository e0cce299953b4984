import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_pipelines.fault_points
from data_pipelines.build import build_dataset
from data_pipelines.config import SourceConfig, TokenizerConfig
from data_pipelines.format import token_dtype
from data_pipelines.manifest import read_manifest
from data_pipelines.packing import read_in_order
from data_pipelines.verify import verify_dataset, verify_streams
from tests.data_pipelines.conftest import (
    DOMAINS,
    dataset_config,
    die_at,
    read_blocks,
    silent,
    write_shards,
)
from tests.oracles.packing import pack_documents

STAGES = [
    "build.scattered_input",
    "build.after_scatter",
    "build.after_tokenizer",
    "build.packed_domain",
    "build.after_pack",
    "build.stream_written",
    "build.stream_written:3",
    "build.after_stream:2",
    "build.before_manifest",
    "build.after_manifest",
    "build.after_rename",
]


def pairs(rows):
    return [(row["tokens"].tolist(), row["documents"].tolist()) for row in rows]


def decompress(root):
    manifest = read_manifest(root / "tiny")
    verify_streams(root / "tiny", manifest, manifest.streams)


def kill_in_child(fault, config, root):
    return die_at(fault, lambda: build_dataset(config, root, processes=1, report=silent))


@pytest.fixture
def faults(monkeypatch):
    """Sets a fault in this process, and takes it away at the end."""

    def ask(text):
        monkeypatch.setenv("CROSSLADDER_FAULT", text)
        importlib.reload(data_pipelines.fault_points)

    yield ask
    monkeypatch.delenv("CROSSLADDER_FAULT", raising=False)
    importlib.reload(data_pipelines.fault_points)


@pytest.mark.parametrize("domain_bytes", [None, 20_000])
def test_built_blocks_equal_those_packed_token_by_token(shards, tmp_path, domain_bytes):
    config = dataset_config(shards, domain_bytes=domain_bytes)
    build_dataset(config, tmp_path, processes=1, report=silent)
    decompress(tmp_path)
    for domain, texts in DOMAINS.items():
        expected = pack_documents(
            texts, seed=3, validation_fraction=0.1, block_tokens=64, domain_bytes=domain_bytes
        )
        for split in ("train", "validation"):
            assert len(expected[split]) > 3
            rows = read_blocks(tmp_path / "tiny" / domain / split)
            assert pairs(rows) == expected[split]


def test_manifest_counts_what_lies_in_the_blocks(built_root):
    decompress(built_root)
    manifest = read_manifest(built_root / "tiny")
    for stream in manifest.streams:
        blocks = pairs(read_blocks(built_root / "tiny" / stream.folder))
        targets = [t for tokens, _ in blocks for t in tokens[1:]]
        assert stream.blocks == len(blocks)
        assert stream.tokens == len(targets)
        assert stream.utf8_bytes == sum(t != 256 for t in targets)
        assert stream.documents == 1 + sum(documents[-1] for _, documents in blocks)
        assert stream.duplicates == len(DOMAINS[stream.domain]) - len(set(DOMAINS[stream.domain]))


def test_sample_ids_never_occur_twice(built_root):
    decompress(built_root)
    ids = []
    for stream in read_manifest(built_root / "tiny").streams:
        ids += [int(row["sample"]) for row in read_blocks(built_root / "tiny" / stream.folder)]
    assert len(ids) == len(set(ids)) > 400


def test_no_validation_document_is_in_train(shards, tmp_path):
    config = dataset_config(shards)
    kill_in_child("build.after_scatter", config, tmp_path)
    held_out, trained = set(), set()
    for domain in DOMAINS:
        for keyed, _ in read_in_order(tmp_path / "tiny.partial/.scattered" / domain, None):
            if keyed:
                side = held_out if keyed.split(0.1) == "validation" else trained
                side.add(keyed.data)
    assert not held_out & trained
    assert held_out | trained == {t.encode() for texts in DOMAINS.values() for t in texts}
    assert 0.05 < len(held_out) / (len(held_out) + len(trained)) < 0.16


def test_the_result_depends_neither_on_processes_nor_on_how_files_are_cut(built_root, tmp_path):
    source = write_shards(tmp_path / "other", DOMAINS, shards=5)
    config = dataset_config(source)
    manifest = build_dataset(config, tmp_path / "root", processes=2, report=silent)
    assert manifest.root_hash == read_manifest(built_root / "tiny").root_hash


def test_a_bucket_at_a_time_gives_the_same_dataset(shards, built_root, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.build.BUCKET_BYTES", 10_000)
    manifest = build_dataset(dataset_config(shards), tmp_path, processes=1, report=silent)
    assert manifest.root_hash == read_manifest(built_root / "tiny").root_hash


@pytest.mark.parametrize("change", [{"seed": 4}, {"block_tokens": 32}, {"domain_bytes": 30_000}])
def test_another_config_gives_another_root_hash(shards, built_root, tmp_path, change):
    manifest = build_dataset(dataset_config(shards, **change), tmp_path, processes=1, report=silent)
    assert manifest.root_hash != read_manifest(built_root / "tiny").root_hash


@pytest.mark.parametrize("fault", STAGES)
def test_a_killed_build_is_not_trusted_and_a_rerun_completes_it(
    shards, built_root, tmp_path, fault
):
    config = dataset_config(shards)
    assert kill_in_child(fault, config, tmp_path) == -signal.SIGKILL
    if fault != "build.after_rename":
        with pytest.raises(RuntimeError, match="no finished dataset"):
            read_manifest(tmp_path / "tiny")
    build_dataset(config, tmp_path, processes=1, report=silent)
    manifest = verify_dataset(tmp_path / "tiny")
    assert manifest.root_hash == read_manifest(built_root / "tiny").root_hash
    left = {p.name for p in tmp_path.rglob("*") if p.name.startswith(".") or ".tmp" in p.name}
    assert left == {".tiny.lock"}
    assert not (tmp_path / "tiny.partial").exists()


def test_finished_stages_are_not_done_again(shards, tmp_path):
    config = dataset_config(shards)
    kill_in_child("build.before_manifest", config, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny.partial").rglob("*.zstd")}
    build_dataset(config, tmp_path, processes=1, report=silent)
    after = {tmp_path / "tiny" / p.relative_to(tmp_path / "tiny.partial") for p in before}
    assert len(after) == 4
    assert {p.stat().st_mtime_ns for p in after} == set(before.values())


def test_a_beginning_of_another_build_is_not_gone_on_with(shards, built_root, tmp_path):
    kill_in_child("build.after_pack", dataset_config(shards, seed=9), tmp_path)
    manifest = build_dataset(dataset_config(shards), tmp_path, processes=1, report=silent)
    assert manifest.root_hash == read_manifest(built_root / "tiny").root_hash


def test_a_killed_worker_process_is_reported_and_survived(shards, built_root, tmp_path, faults):
    config = dataset_config(shards)
    faults("build.scattered_input:1")
    with pytest.raises(RuntimeError, match="process of the build was killed"):
        build_dataset(config, tmp_path, processes=2, report=silent)
    faults("")
    manifest = build_dataset(config, tmp_path, processes=1, report=silent)
    assert manifest.root_hash == read_manifest(built_root / "tiny").root_hash


def test_workers_die_with_their_parent(tmp_path):
    code = (
        "import os, sys, time\n"
        "from data_pipelines.workers import open_workers\n"
        "if __name__ == '__main__':\n"
        "    with open_workers(2) as workers:\n"
        "        for done in workers.map(abs, range(2)):\n"
        "            pass\n"
        "        print(*workers._executor._processes, flush=True)\n"
        "        time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = parent.stdout.readline().split()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) == 2
    assert not any(is_running(pid) for pid in children)


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "fault", ["build.scattered_input", "build.packed_domain:2", "build.stream_written:2"]
)
def test_a_full_disk_gives_one_clear_message_and_nothing_half_written(
    shards, built_root, tmp_path, faults, fault
):
    name, _, count = fault.partition(":")
    faults(f"{name}:{count or 1}:enospc")
    config = dataset_config(shards)
    message = r"disk is full: .* tiny takes about \d+ bytes, and \d+ are free at .* free some"
    with pytest.raises(RuntimeError, match=message):
        build_dataset(config, tmp_path, processes=1, report=silent)
    assert not (tmp_path / "tiny").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    faults("")
    manifest = build_dataset(config, tmp_path, processes=1, report=silent)
    assert manifest.root_hash == read_manifest(built_root / "tiny").root_hash


def test_a_second_call_finds_the_dataset_and_builds_nothing(shards, built_root):
    stages = []
    manifest = build_dataset(
        dataset_config(shards), built_root, processes=2, report=lambda s, _: stages.append(s)
    )
    assert manifest == read_manifest(built_root / "tiny")
    assert not stages


def test_another_config_in_the_place_of_a_dataset_is_refused_by_key(shards, built_root):
    with pytest.raises(ValueError, match=r"dataset\.block_tokens is 32, but .* built with 64"):
        build_dataset(
            dataset_config(shards, block_tokens=32), built_root, processes=1, report=silent
        )


def test_a_shard_missing_from_a_finished_dataset_is_found_at_the_second_call(shards, copied_root):
    (copied_root / "tiny/beta/train/shard.00000.mds.zstd").unlink()
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds\.zstd is missing .* build the"):
        build_dataset(dataset_config(shards), copied_root, processes=1, report=silent)


def test_an_altered_manifest_is_refused(copied_root):
    file = copied_root / "tiny/MANIFEST.json"
    file.write_text(file.read_text().replace('"block_tokens": 64', '"block_tokens": 32'))
    with pytest.raises(RuntimeError, match="does not match its own root hash"):
        read_manifest(copied_root / "tiny")


def test_too_few_documents_for_a_block_are_refused(tmp_path):
    source = write_shards(tmp_path / "source", {"alpha": ["one", "two", "three"]}, shards=1)
    with pytest.raises(ValueError, match=r"block_tokens 64 is more than the \d+ tokens of alpha/"):
        build_dataset(dataset_config(source), tmp_path / "root", processes=1, report=silent)


def test_a_trained_tokenizer_is_the_same_at_every_build(shards, tmp_path):
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=400)
    config = dataset_config(shards, tokenizer=tokenizer)
    first, second = (
        build_dataset(config, tmp_path / name, processes=1, report=silent) for name in "ab"
    )
    assert first.root_hash == second.root_hash
    assert first.vocab_size == 400


def test_a_large_vocabulary_is_stored_in_wider_tokens(shards, tmp_path, monkeypatch):
    for module in ("packing", "format"):
        monkeypatch.setattr(f"data_pipelines.{module}.token_dtype", lambda _: "uint32")
    build_dataset(dataset_config(shards), tmp_path, processes=1, report=silent)
    (stored,) = json.loads((tmp_path / "tiny/alpha/train/index.json").read_text())["shards"]
    assert stored["column_encodings"] == ["ndarray:uint32:65", "uint64", "ndarray:uint32:65"]


def test_types_hold_what_they_must():
    assert token_dtype(1 << 16) == "uint16"
    assert token_dtype((1 << 16) + 1) == "uint32"


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_at_every_build(tmp_path):
    config = dataset_config(
        "", name="embedded", source=SourceConfig("installed"), domain_bytes=600_000
    )
    first = build_dataset(config, tmp_path / "first", processes=1, report=silent)
    second = build_dataset(config, tmp_path / "second", processes=2, report=silent)
    assert first.root_hash == second.root_hash
    assert first.domains == ["cpp", "prose", "python"]
    assert not first.source["below_domain_bytes"]
    for stream in first.streams:
        assert stream.document_bytes > 0
    for domain in first.domains:
        both = [first.stream(domain, split).document_bytes for split in ("train", "validation")]
        assert 0.4 * 600_000 < sum(both) <= 600_000
