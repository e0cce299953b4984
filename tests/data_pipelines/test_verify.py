import errno
import json
import os
import signal

import pytest

from data_pipelines import shards
from data_pipelines.evaluation_sets import evaluation_batches
from data_pipelines.manifest import read_manifest
from data_pipelines.stream import TokenStream
from data_pipelines.verify import _cannot_decompress, verify_dataset
from tests.data_pipelines.conftest import DOMAINS, corpus, die_at

ZIPPED = "tiny/alpha/train/shard.00000.mds.zstd"
RAW = "tiny/alpha/train/shard.00000.mds"
INDEX = "tiny/alpha/train/index.json"


def open_stream(root):
    return TokenStream(corpus(), root, rank=0, ranks=1, batch_sequences=8, first_step=0)


def read_some(root):
    return next(iter(open_stream(root))).samples.tolist()


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "flipped at the start": lambda path: flip(path, 3),
    "flipped in the middle": lambda path: flip(path, 4000),
    "replaced by a link": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_shard_is_named_before_it_is_read(copied_root, damage):
    DAMAGES[damage](copied_root / ZIPPED)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"alpha/train/shard\.00000\.mds\.zstd .*delete"):
            open_stream(copied_root)
    with pytest.raises(RuntimeError, match=r"alpha/train/shard\.00000\.mds\.zstd"):
        verify_dataset(copied_root / "tiny")


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_decompressed_shard_is_made_anew_from_its_source(copied_root, damage):
    expected = read_some(copied_root)
    content = (copied_root / RAW).read_bytes()
    DAMAGES[damage](copied_root / RAW)
    assert read_some(copied_root) == expected
    assert (copied_root / RAW).read_bytes() == content


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_decompressed_shard_without_a_sound_source_is_refused_if_damaged(copied_root, damage):
    read_some(copied_root)
    flip(copied_root / ZIPPED, 100)
    DAMAGES[damage](copied_root / RAW)
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds\.zstd does not match its hash"):
        read_some(copied_root)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_shard_that_is_damaged_while_it_is_read_is_named(copied_root, damage):
    batches = iter(open_stream(copied_root))
    next(batches)
    DAMAGES[damage](copied_root / RAW)
    DAMAGES[damage](copied_root / RAW.replace("alpha", "beta"))

    def read_an_epoch():
        for _ in range(12):
            next(batches)

    with pytest.raises(RuntimeError, match=r"train/shard\.00000\.mds cannot be read at"):
        read_an_epoch()


def test_a_reader_killed_while_it_decompresses_leaves_nothing_that_is_trusted(copied_root):
    ended = die_at("verify.decompressed:2", lambda: open_stream(copied_root))
    assert ended == -signal.SIGKILL
    assert len(list(copied_root.rglob("*.mds.tmp"))) == 1
    read_some(copied_root)
    verify_dataset(copied_root / "tiny")
    assert not list(copied_root.rglob("*.tmp"))


def rot(path):
    """Change one bit, and nothing that the file system tells of the file."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(5000)
        (byte,) = file.read(1)
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_ino", "st_size", "st_mtime_ns")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]


def evaluate(root, split):
    batches = evaluation_batches(
        corpus(), root, "alpha", split=split, batch_sequences=4, max_blocks=4
    )
    return [batch.tokens.tolist() for batch in batches]


READERS = {
    "train": read_some,
    "validation": lambda root: evaluate(root, "validation"),
    "baseline": lambda root: evaluate(root, "train"),
}


@pytest.mark.parametrize("reader", list(READERS))
def test_rot_that_leaves_size_and_times_alone_is_mended_before_a_block_is_read(copied_root, reader):
    read = READERS[reader]
    path = copied_root / (RAW.replace("train", "validation") if reader == "validation" else RAW)
    expected, content = read(copied_root), path.read_bytes()
    rot(path)
    assert path.read_bytes() != content
    assert read(copied_root) == expected
    assert path.read_bytes() == content


@pytest.mark.parametrize("reader", list(READERS))
def test_rot_of_both_forms_of_a_shard_is_refused(copied_root, reader):
    read = READERS[reader]
    path = copied_root / (RAW.replace("train", "validation") if reader == "validation" else RAW)
    read(copied_root)
    rot(path)
    flip(path.with_name(path.name + ".zstd"), 100)
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds\.zstd does not match its hash"):
        read(copied_root)


def test_a_shard_is_hashed_once_by_each_stream_that_reads_it(copied_root, monkeypatch):
    hashed = []
    real = shards.make_sure

    def count(folder, shard):
        hashed.append(shard.name)
        real(folder, shard)

    read_some(copied_root)
    monkeypatch.setattr(shards, "make_sure", count)
    for _ in range(2):
        stream = iter(open_stream(copied_root))
        assert not hashed
        for _ in range(12):
            next(stream)
        assert sorted(hashed) == [RAW.removeprefix("tiny/").replace("alpha", d) for d in DOMAINS]
        hashed.clear()


def set_in(index, path, value):
    *parents, last = path
    for key in parents:
        index = index[key]
    index[last] = value


SHARD = ("shards", 0)
HOSTILE = {
    "pickle": ((*SHARD, "column_encodings", 0), "pkl"),
    "image": ((*SHARD, "column_encodings", 2), "jpeg"),
    "shapeless": ((*SHARD, "column_encodings", 2), "ndarray:uint16"),
    "parent folder": ((*SHARD, "raw_data", "basename"), "../evil.bin"),
    "absolute path": ((*SHARD, "zip_data", "basename"), "/etc/passwd"),
    "many samples": ((*SHARD, "samples"), 10**9),
    "samples as text": ((*SHARD, "samples"), "40"),
    "no samples": ((*SHARD, "samples"), True),
    "other size": ((*SHARD, "raw_data", "bytes"), 1 << 40),
    "other hash": ((*SHARD, "zip_data", "hashes", "sha256"), "0" * 64),
    "no hash": ((*SHARD, "zip_data", "hashes"), {}),
    "no compression": ((*SHARD, "compression"), None),
    "other format": ((*SHARD, "format"), "csv"),
    "unknown key": ((*SHARD, "remote"), "s3://elsewhere"),
    "column sizes": ((*SHARD, "column_sizes", 0), None),
    "version": (("version",), 3),
    "no shards": (("shards",), []),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_an_index_that_differs_from_the_manifest_is_refused(copied_root, name):
    file = copied_root / INDEX
    index = json.loads(file.read_text())
    set_in(index, *HOSTILE[name])
    file.write_text(json.dumps(index))
    with pytest.raises(RuntimeError, match=r"alpha/train/index\.json does not repeat the manifest"):
        open_stream(copied_root)
    assert not (copied_root / "tiny/alpha/evil.bin").exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[" * 3000, '{"version": 2}', "[" * 100_000, '{"a": "' + "x" * 10**6 + '"}'],
)
def test_an_index_that_is_no_index_is_refused(copied_root, text):
    (copied_root / INDEX).write_text(text)
    with pytest.raises(RuntimeError, match=r"alpha/train/index\.json"):
        open_stream(copied_root)


def test_duplicate_shards_in_an_index_are_refused(copied_root):
    file = copied_root / INDEX
    index = json.loads(file.read_text())
    index["shards"] *= 2
    file.write_text(json.dumps(index))
    with pytest.raises(RuntimeError, match="does not repeat the manifest: shards"):
        open_stream(copied_root)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {}}', "[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(copied_root, content):
    (copied_root / "tiny/MANIFEST.json").write_text(content)
    with pytest.raises(RuntimeError, match=r"MANIFEST\.json cannot be read"):
        read_manifest(copied_root / "tiny")


def test_a_manifest_too_large_to_be_one_is_not_read(copied_root, monkeypatch):
    monkeypatch.setattr("data_pipelines.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(RuntimeError, match=r"MANIFEST\.json has \d+ bytes, more than the 100"):
        read_manifest(copied_root / "tiny")


STREAM = ("streams", 0)
FORGED = {
    "shard elsewhere": ((*STREAM, "shards", 0, "name"), "../../evil/shard.00000.mds"),
    "shard of another stream": ((*STREAM, "shards", 0, "name"), "beta/train/shard.00000.mds"),
    "absolute shard": ((*STREAM, "shards", 0, "zip_name"), "/etc/passwd"),
    "hidden shard": ((*STREAM, "shards", 0, "name"), "alpha/train/..mds"),
    "domain elsewhere": ((*STREAM, "domain"), "../x"),
    "domain as a number": ((*STREAM, "domain"), 3),
    "another split": ((*STREAM, "split"), "test"),
    "huge shard": ((*STREAM, "shards", 0, "raw_bytes"), 1 << 50),
    "small shard": ((*STREAM, "shards", 0, "raw_bytes"), 10),
    "huge compressed shard": ((*STREAM, "shards", 0, "zip_bytes"), 1 << 50),
    "many samples": ((*STREAM, "shards", 0, "samples"), 1 << 40),
    "negative samples": ((*STREAM, "shards", 0, "samples"), -1),
    "samples as text": ((*STREAM, "shards", 0, "samples"), "9"),
    "other blocks": ((*STREAM, "blocks"), 7),
    "bytes as a truth": ((*STREAM, "utf8_bytes"), True),
    "long blocks": (("block_tokens",), 1 << 40),
    "blocks as a fraction": (("block_tokens",), 64.5),
    "negative vocabulary": (("vocab_size",), -1),
    "config as a list": (("config",), []),
    "no tokenizer": (("config", "tokenizer"), None),
    "tokenizer without kind": (("config", "tokenizer"), {}),
    "dataset elsewhere": (("config", "name"), "../x"),
    "source as text": (("source",), "x"),
}


@pytest.mark.parametrize("name", list(FORGED))
def test_a_forged_manifest_with_a_fitting_hash_is_refused(copied_root, monkeypatch, name):
    file = copied_root / "tiny/MANIFEST.json"
    plain = json.loads(file.read_text())
    set_in(plain, *FORGED[name])
    file.write_text(json.dumps(plain))
    # Whoever writes a manifest can write its hash as well.
    monkeypatch.setattr("data_pipelines.manifest.root_hash", lambda _: plain["root_hash"])
    with pytest.raises(RuntimeError, match=r"MANIFEST\.json cannot be read"):
        read_manifest(copied_root / "tiny")


def test_a_whole_dataset_passes_its_verification(built_root):
    assert verify_dataset(built_root / "tiny") == read_manifest(built_root / "tiny")


@pytest.mark.parametrize(
    ("number", "said", "unsaid"),
    [
        (errno.ENOSPC, "12345 bytes", "owner"),
        (errno.EDQUOT, "12345 bytes", "owner"),
        (errno.EACCES, "ask its owner", "free"),
        (errno.EPERM, "ask its owner", "free"),
        (errno.EROFS, "execution.data_root", "free"),
        (errno.EIO, "check that disk", "free"),
    ],
)
def test_a_shard_that_cannot_be_written_tells_the_remedy_of_its_reason(
    tmp_path, number, said, unsaid
):
    error = OSError(number, os.strerror(number))
    message = _cannot_decompress(error, tmp_path / "shard", 12345)
    assert os.strerror(number) in message
    assert said in message
    assert unsaid not in message
