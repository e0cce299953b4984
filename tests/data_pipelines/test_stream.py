import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_pipelines.batch import IGNORED, mix, target_bytes
from data_pipelines.evaluation_sets import (
    check_evaluation,
    evaluation_batches,
    evaluation_sets,
    held_out,
    spread_groups,
)
from data_pipelines.manifest import read_manifest
from data_pipelines.shards import certificate
from data_pipelines.stream import TokenStream
from data_pipelines.tokenizers import ByteTokenizer
from tests.data_pipelines.conftest import DOMAINS, corpus
from tests.oracles.packing import pack_documents


def open_stream(root, config=None, *, rank=0, ranks=1, sequences=8, first=0, expected=None):
    return TokenStream(
        config or corpus(),
        root,
        rank=rank,
        ranks=ranks,
        batch_sequences=sequences,
        first_step=first,
        expected_root_hash=expected,
    )


def take(stream, steps):
    return list(itertools.islice(stream, steps))


def content(batch):
    parts = (batch.tokens, batch.targets, batch.documents, batch.samples)
    return [part.tolist() for part in parts]


def segments():
    """Segments of shared memory, but for what processes that are not of this test hold."""
    there = set(Path("/dev/shm").iterdir())
    test = psutil.Process()
    own = {test.pid, *(child.pid for child in test.children(recursive=True))}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if int(maps.parent.name) not in own:
            # A process may end while it is looked at.
            with contextlib.suppress(OSError):
                held = re.findall(r"/dev/shm/\S+", maps.read_text())
                there -= {Path(name) for name in held}
    return there


def left(before, patience_s=20.0):
    """Segments that are there to stay and were not before."""
    deadline = time.monotonic() + patience_s
    # What a killed process of another test leaves is taken away soon; ours would stay.
    while (new := segments() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    return new


@pytest.mark.parametrize("seq_len", [64, 16, 192])
def test_global_batches_are_the_same_for_any_number_of_ranks(built_root, seq_len):
    config = corpus(seq_len=seq_len)
    sequences = 8 * config.pieces
    alone = take(open_stream(built_root, config, sequences=sequences), 30)
    for ranks in (2, 4):
        shares = [
            take(open_stream(built_root, config, rank=r, ranks=ranks, sequences=sequences), 30)
            for r in range(ranks)
        ]
        for whole, *parts in zip(alone, *shares, strict=True):
            assert np.concatenate([p.samples for p in parts]).tolist() == whole.samples.tolist()
            sums = sum(certificate(p.samples) for p in parts) % 2**64
            assert sums == certificate(whole.samples)
            assert [row for p in parts for row in p.tokens.tolist()] == whole.tokens.tolist()


@pytest.mark.parametrize("first", [1, 11, 12, 13, 25])
@pytest.mark.parametrize("epoch_blocks", [96, 100])
def test_a_resumed_stream_equals_the_uninterrupted_one(built_root, first, epoch_blocks):
    config = corpus(epoch_blocks=epoch_blocks, domains={"alpha": 0.5, "beta": 0.5})
    whole = take(open_stream(built_root, config), 30)
    resumed = take(open_stream(built_root, config, first=first), 30 - first)
    assert [content(b) for b in resumed] == [content(b) for b in whole[first:]]


def test_a_shorter_context_cuts_the_very_same_blocks(built_root):
    long = take(open_stream(built_root, corpus(seq_len=64), sequences=8), 5)
    short = take(open_stream(built_root, corpus(seq_len=16), sequences=32), 5)
    for a, b in zip(long, short, strict=True):
        assert a.tokens.tolist() == b.tokens.reshape(8, 64).tolist()
        assert b.targets[a.targets.reshape(32, 16) != b.targets].numel() == 0
        assert len(set(b.samples.tolist())) == 32


def test_a_longer_context_is_what_longer_blocks_would_hold(built_root):
    options = {"seed": 3, "validation_fraction": 0.1, "block_tokens": 192}
    longer = [block for d in DOMAINS.values() for block in pack_documents(d, **options)["train"]]
    expected = {tuple(tokens[:-1]): (tokens, documents) for tokens, documents in longer}
    stream = open_stream(built_root, corpus(seq_len=192), sequences=4)
    batches, ids = take(stream, 16), {}
    for tokens, targets, documents, sample in zip(*columns(batches), strict=True):
        following, numbers = expected[tuple(tokens)]
        assert documents == numbers[:-1]
        same = (a == b for a, b in itertools.pairwise(numbers))
        assert targets == [t if s else IGNORED for t, s in zip(following[1:], same, strict=True)]
        assert ids.setdefault(sample, tokens) == tokens
    read = sum(r.blocks for r in stream.realised().values())
    assert read == 3 * 4 * 16


def columns(batches):
    rows = [content(batch) for batch in batches]
    return [list(itertools.chain.from_iterable(column)) for column in zip(*rows, strict=True)]


def test_an_evaluation_joins_what_it_reads(built_root):
    config = corpus(seq_len=192)
    short, long = (
        list(evaluation_batches(c, built_root, "alpha", batch_sequences=4, max_blocks=None))
        for c in (corpus(), config)
    )
    whole = len(np.concatenate([b.tokens.numpy() for b in long])) * 192
    for name in ("tokens", "targets"):
        of_short, of_long = (
            np.concatenate([getattr(b, name).numpy().ravel() for b in each])
            for each in (short, long)
        )
        assert of_long.tolist() == of_short[:whole].tolist()
    with pytest.raises(ValueError, match=r"takes 3 for one sequence; raise"):
        next(evaluation_batches(config, built_root, "alpha", batch_sequences=4, max_blocks=2))
    with pytest.raises(ValueError, match=r"takes 3 for one sequence; raise"):
        check_evaluation(config, built_root, 2)


def test_documents_of_an_evaluation_are_those_of_the_text(built_root):
    """Counted over all blocks, cut or whole: those that separators enclose."""
    described = read_manifest(built_root / "tiny").stream("alpha", "validation")
    for length in (32, 64, 192):
        config = corpus(seq_len=length)
        groups = spread_groups(config, described, None)
        read = list(held_out(config, built_root, described, groups, 3))
        tokens = np.concatenate([each.batch.tokens.numpy().ravel() for each in read])
        numbers = np.concatenate(
            [
                (each.first_documents[:, None] + each.batch.documents.numpy()).ravel()
                for each in read
            ]
        )
        # A document begins and ends with a separator, so every second one begins the next.
        assert numbers.tolist() == ((np.cumsum(tokens == 256) - 1) // 2).tolist()
        groups_of = np.concatenate([each.groups for each in read])
        assert sorted(set(groups_of.tolist())) == groups


def test_a_document_that_goes_on_across_a_gap_counts_on_both_sides(built_root):
    described = read_manifest(built_root / "tiny").stream("alpha", "validation")
    near, far = (
        [int(n) for each in held_out(corpus(), built_root, described, groups, 4)
         for n in each.first_documents]
        for groups in ([0, 1], [0, 2])
    )  # fmt: skip
    (first,) = evaluation_batches(corpus(), built_root, "alpha", batch_sequences=1, max_blocks=1)
    borders = int(first.documents[0, -1])
    assert near[1] - near[0] in (borders, borders + 1)
    assert far[1] - far[0] in (borders + 1, borders + 2)


def test_a_context_that_no_shard_holds_is_refused(built_root):
    config = corpus(seq_len=64 * 4096, epoch_blocks=4096)
    with pytest.raises(ValueError, match=r"joins 4096 blocks, but no shard of alpha .* as many"):
        open_stream(built_root, config, sequences=1)


def test_each_epoch_holds_no_block_twice_and_the_shares_asked_for(built_root):
    config = corpus(epoch_blocks=96)
    stream = open_stream(built_root, config)
    batches = take(stream, 12)
    assert len({int(s) for b in batches for s in b.samples}) == 96
    realised = stream.realised()
    assert realised["alpha"].blocks == realised["alpha"].unique_blocks == 72
    assert realised["beta"].blocks == realised["beta"].unique_blocks == 24
    assert realised["beta"].most_repeats == 1


def test_shares_hold_within_one_percent_over_part_of_a_larger_epoch(built_root):
    config = corpus(domains={"alpha": 0.7, "beta": 0.3}, epoch_blocks=30_000)
    stream = open_stream(built_root, config, sequences=200, first=100)
    realised = stream.realised()
    total = sum(r.blocks for r in realised.values())
    assert total == 20_000
    assert abs(realised["alpha"].blocks / total - 0.7) < 0.01


def test_realised_counts_what_was_read(built_root):
    config = corpus(epoch_blocks=40, domains={"alpha": 0.5, "beta": 0.5})
    stream = open_stream(built_root, config)
    seen = Counter(int(s) for b in take(stream, 11) for s in b.samples)
    realised = stream.realised()
    assert sum(r.blocks for r in realised.values()) == 88 == sum(seen.values())
    assert sum(r.unique_blocks for r in realised.values()) == len(seen)
    assert max(r.most_repeats for r in realised.values()) == max(seen.values())


def test_less_unique_text_is_contained_in_more(built_root):
    def blocks(unique_bytes):
        config = corpus(unique_bytes=unique_bytes, epoch_blocks=192)
        return {int(s) for b in take(open_stream(built_root, config), 48) for s in b.samples}

    few, more = blocks(4_000), blocks(8_000)
    assert few < more
    assert len(few) == pytest.approx(4_000 / 64, rel=0.1)


def test_more_unique_text_than_there_is_is_refused(built_root):
    with pytest.raises(ValueError, match=r"unique_bytes 10000000 asks .* choose at most \d+"):
        open_stream(built_root, corpus(unique_bytes=10_000_000))


def test_every_token_but_the_first_of_its_document_is_a_target(built_root):
    config = corpus(domains={"alpha": 1.0}, epoch_blocks=96)
    for batch in take(open_stream(built_root, config), 12):
        following = batch.documents[:, 1:] == batch.documents[:, :-1]
        inner = batch.targets[:, :-1]
        assert (inner[following] == batch.tokens[:, 1:][following]).all()
        assert (inner[~following] == IGNORED).all()
        assert (batch.tokens[:, 1:][~following] == 256).all()
        assert (batch.documents[:, 0] == 0).all()


def test_evaluation_reads_blocks_spread_over_the_set_in_order(built_root):
    expected = pack_documents(DOMAINS["beta"], seed=3, validation_fraction=0.1, block_tokens=64)
    batches = list(
        evaluation_batches(corpus(seq_len=32), built_root, "beta", batch_sequences=3, max_blocks=5)
    )
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    read = [row for b in batches for row in b.tokens.reshape(-1, 32).tolist()]
    every = expected["validation"]
    chosen = [every[place * len(every) // 5] for place in range(5)]
    want = [t for tokens, _ in chosen for t in (tokens[:32], tokens[32:64])]
    assert chosen != every[:5]
    assert read == want
    assert evaluation_sets(built_root, "tiny") == ["alpha", "beta"]


def test_bytes_of_targets_are_those_of_the_text(built_root):
    lengths = ByteTokenizer().byte_lengths
    stream = read_manifest(built_root / "tiny").stream("beta", "validation")
    batches = evaluation_batches(corpus(), built_root, "beta", batch_sequences=4, max_blocks=10_000)
    assert sum(target_bytes(b, lengths) for b in batches) == stream.utf8_bytes


def test_certificates_ignore_order_and_notice_everything_else():
    samples = np.arange(100, dtype=np.uint64)
    assert certificate(samples) == certificate(samples[::-1])
    assert certificate(samples) == (certificate(samples[:30]) + certificate(samples[30:])) % 2**64
    assert certificate(samples) != certificate(samples[1:])
    assert certificate(samples) != certificate(samples + np.uint64(1))


STOCK = """
import json, sys
from streaming import Stream, StreamingDataset

def read(canonical):
    folder = sys.argv[1]
    streams = [
        Stream(local=f"{folder}/alpha/train", proportion=0.75),
        Stream(local=f"{folder}/beta/train", proportion=0.25),
    ]
    dataset = StreamingDataset(
        streams=streams, epoch_size=96, shuffle=True, shuffle_algo="py1e", shuffle_seed=17,
        shuffle_block_size=1 << 18, num_canonical_nodes=canonical, sampling_granularity=64,
        batch_size=1, predownload=8, keep_zip=True,
    )
    return [int(row["sample"]) for epoch in range(3) for row in dataset]

print(json.dumps({canonical: read(canonical) for canonical in (1, 4)}))
"""


def test_the_order_is_the_one_of_streaming_dataset_itself(built_root, tmp_path):
    open_stream(built_root).close()
    command = [sys.executable, "-c", STOCK, str(built_root / "tiny")]
    # It leaves its file locks in the folder for temporary files.
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    for canonical, theirs in json.loads(found.stdout).items():
        config = corpus(num_canonical_nodes=int(canonical))
        ours = [b.samples for b in take(open_stream(built_root, config), 36)]
        assert np.concatenate(ours).tolist() == mix(np.array(theirs, np.uint64), 0).tolist()


def test_neither_thread_nor_segment_nor_file_is_left(built_root):
    open_stream(built_root).close()
    threads, shared = threading.active_count(), segments()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for seed in range(50):
        stream = open_stream(built_root, corpus(shuffle_seed=seed))
        take(stream, 2)
        stream.close()
    assert threading.active_count() == threads
    assert not left(shared)
    assert len(list(Path("/proc/self/fd").iterdir())) == files


def test_environment_of_a_launcher_does_not_matter(built_root, monkeypatch):
    expected = content(take(open_stream(built_root), 1)[0])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert content(take(open_stream(built_root), 1)[0]) == expected


def start_reader(root, *, hangs):
    """A forked process that opens stream after stream; returns its id and what it writes to."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child:
        os.close(sender)
        return child, receiver
    for seed in range(20):
        stream = open_stream(root, corpus(shuffle_seed=seed))
        total = sum(certificate(b.samples) for b in take(stream, 5)) % 2**64
        os.write(sender, total.to_bytes(8, "little"))
        if hangs and seed == 10:
            time.sleep(60)
        stream.close()
    os._exit(0)


def read_exactly(receiver, size):
    with os.fdopen(receiver, "rb", buffering=0) as file:
        data = b""
        while len(data) < size and (more := file.read(size - len(data))):
            data += more
    return np.frombuffer(data, np.uint64).tolist()


def test_two_readers_at_once_and_a_killed_one_do_not_disturb_each_other(copied_root):
    shared = segments()
    (killed, written), (other, results) = (
        start_reader(copied_root, hangs=hangs) for hangs in (True, False)
    )
    first = read_exactly(written, 11 * 8)
    os.kill(killed, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    second = read_exactly(results, 20 * 8)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    expected = [
        sum(
            certificate(b.samples)
            for b in take(open_stream(copied_root, corpus(shuffle_seed=s)), 5)
        )
        % 2**64
        for s in range(20)
    ]
    assert first == expected[:11]
    assert second == expected
    assert not left(shared)
    assert not list(copied_root.rglob("*.tmp"))


def test_a_batch_that_cannot_be_shared_out_is_refused(built_root):
    with pytest.raises(ValueError, match=r"step of 6 sequences .* need a multiple of 4"):
        open_stream(built_root, rank=0, ranks=4, sequences=6)
    with pytest.raises(ValueError, match=r"1 ranks x 4 sequences per block need a multiple of 4"):
        open_stream(built_root, corpus(seq_len=16), sequences=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {"gamma": 1.0}}, r"gamma/train, which dataset tiny lacks; choose among alpha"),
        ({"block_tokens": 128}, r"block_tokens is 128, but .* blocks of 64"),
    ],
)
def test_a_corpus_that_does_not_fit_its_dataset_is_refused(built_root, changes, message):
    with pytest.raises(ValueError, match=message):
        open_stream(built_root, corpus(**changes))


def test_another_root_hash_than_the_registered_one_is_refused(built_root):
    right = read_manifest(built_root / "tiny").root_hash
    open_stream(built_root, expected=right)
    with pytest.raises(RuntimeError, match=r"has the root hash .* but 0123456789abcdef was"):
        open_stream(built_root, expected="0123456789abcdef")
