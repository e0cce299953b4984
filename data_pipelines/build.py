"""Build a dataset: documents -> dedup, split, shuffle -> tokens -> blocks -> MDS and a manifest.

Everything is written to `<root>/<name>.partial/`, stage by stage. Each stage ends with a rename,
and the whole build with that to `<root>/<name>/`, so a killed build resumes where it stopped.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from streaming import MDSWriter

from data_pipelines.batch import mix
from data_pipelines.config import DatasetConfig
from data_pipelines.durable import hold_lock, open_stage, sync, write_durably
from data_pipelines.fault_points import fault_point
from data_pipelines.format import COMPRESSION, HASHES, SHARD_BYTES, columns
from data_pipelines.inputs import read_readings, require_same_inputs, write_readings
from data_pipelines.installed import LOCK, Installed, survey, write_raw
from data_pipelines.manifest import (
    INDEX,
    Manifest,
    Shard,
    Stream,
    read_manifest,
    rebuild,
    root_hash,
    write_manifest,
)
from data_pipelines.packing import (
    PACKED,
    SCATTERED,
    SPLITS,
    DomainFacts,
    Pack,
    Scatter,
    count_blocks,
    iterate_blocks,
    pack,
    read_facts,
    read_in_order,
    scatter,
)
from data_pipelines.sources import SOURCE, Input, files_of, list_inputs
from data_pipelines.tokenizers import (
    SAVED,
    Tokenizer,
    load_tokenizer,
    read_given_tokenizer,
    train_bpe,
)
from data_pipelines.verify import missing_file
from data_pipelines.workers import Workers, open_workers
from untrusted.paths import inside

BUCKET_BYTES = 256 << 20
BPE_BYTES = 8_000_000
"""Bytes of each domain's text that BPE is trained on."""
DISK_FACTOR = 5
"""Disk space that a build and its first reader need, as a multiple of the text."""
COMPRESSED_TEXT = 4
"""Typical compression ratio of text."""
STATE = "STATE.json"
LEFTOVERS = (SCATTERED, PACKED)

Report = Callable[[str, float], None]
Places = dict[str, DomainFacts]


def build_dataset(
    config: DatasetConfig, root: Path, *, processes: int = 2, report: Report
) -> Manifest:
    """Build a dataset, resume an interrupted build, or return the existing one.

    Args:
        config: what to build.
        root: folder of all datasets; this one becomes `root / config.name`.
        processes: that read and tokenize; the result does not depend on it.
        report: called with the stage and the share of it that is done.

    Raises:
        ValueError: the config does not fit the documents, or the existing dataset was built from
            another one.
        RuntimeError: a document or file is malformed, or the disk is full.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, partial = inside(root, config.name), inside(root, f"{config.name}.partial")
    with hold_lock(root / f".{config.name}.lock"):
        if not final.exists():
            try:
                with open_workers(processes) as workers:
                    _Build(config, partial, workers, report).run()
                partial.rename(final)
                sync(root)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise _disk_full(config, root, partial) from error
            fault_point("build.after_rename")
        manifest = _existing(config, final)
        for leftover in LEFTOVERS:
            shutil.rmtree(final / leftover, ignore_errors=True)
        (final / STATE).unlink(missing_ok=True)
    return manifest


def _existing(config: DatasetConfig, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    wanted = _plain(config)
    for key in sorted(wanted):
        if manifest.config.get(key) != wanted[key]:
            raise ValueError(
                f"dataset.{key} is {wanted[key]!r}, but {folder} was built with "
                f"{manifest.config.get(key)!r}; choose another dataset.name or delete the folder"
            )
    if wrong := missing_file(folder, manifest):
        raise RuntimeError(f"{wrong} is missing or has another size; {rebuild(folder)}")
    require_same_inputs(config, manifest, folder)
    return manifest


class _Build:
    """The stages of one build; each is skipped if its result exists."""

    def __init__(
        self, config: DatasetConfig, folder: Path, workers: Workers, report: Report
    ) -> None:
        self.config, self.folder, self.workers, self.report = config, folder, workers, report

    def run(self) -> None:
        """All stages; what is left is the rename of the folder."""
        # The tokenizer that is brought along first: reading the documents may take hours.
        given = self.config.tokenizer.given
        self._tokenizer_json = read_given_tokenizer(self.config.tokenizer) if given else ""
        installed = survey(LOCK) if self.config.source.kind == "installed" else None
        self._begin(installed)
        self._scatter(self._gather(installed) if installed else list_inputs(self.config.source))
        self._read = read_readings(self.folder / SCATTERED)
        domains = sorted(self._read["domain_names"])
        if not domains:
            raise ValueError(
                f"dataset.source of {self.config.name} has no documents; check source.paths"
            )
        self._make_tokenizer(domains)
        tokenizer = load_tokenizer(self.config.tokenizer, self.folder)
        facts = self._pack(domains)
        self._check_blocks(facts)
        streams = []
        for domain in domains:
            for split in SPLITS:
                self.report("write blocks", len(streams) / (len(domains) * len(SPLITS)))
                streams.append(self._write_stream(domain, split, facts[domain], tokenizer))
        fault_point("build.before_manifest")
        write_manifest(self.folder, self._manifest(tokenizer, facts, tuple(streams)))
        self.report("done", 1.0)
        fault_point("build.after_manifest")

    def _begin(self, installed: Installed | None) -> None:
        """Empty the folder unless it holds an interrupted build of the same config and sources."""
        if installed:
            source: list = [installed.python, installed.packages]
        else:
            files = [p for given in list_inputs(self.config.source) for p in files_of(given)]
            source = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        tokenizer = hashlib.sha256(self._tokenizer_json.encode()).hexdigest()
        state = json.dumps(
            {"config": _plain(self.config), "source": source, "tokenizer": tokenizer}
        )
        file = self.folder / STATE
        if not file.is_file() or file.read_text() != state:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            write_durably(file, state)

    def _gather(self, installed: Installed) -> list[Input]:
        raw = self.folder / "raw"
        with open_stage(raw) as partial:
            if partial:
                cap = self.config.domain_bytes
                write_raw(installed, cap, partial, self.workers, self._reporter("gather text"))
        fault_point("build.after_raw")
        return [Input(str(path), "jsonl") for path in sorted(raw.glob("*.jsonl.zst"))]

    def _scatter(self, inputs: list[Input]) -> None:
        with open_stage(self.folder / SCATTERED) as partial:
            if partial:
                size = sum(path.stat().st_size for given in inputs for path in files_of(given))
                bits = (size // BUCKET_BYTES).bit_length()
                tasks = [
                    Scatter(given, i, str(partial), bits, self.config.seed)
                    for i, given in enumerate(inputs)
                ]
                readings = []
                for done, read in enumerate(self.workers.map(scatter, tasks), start=1):
                    readings.append(read)
                    self.report("read documents", done / len(tasks))
                write_readings(partial, self.config.source, inputs, readings)
        fault_point("build.after_scatter")

    def _make_tokenizer(self, domains: list[str]) -> None:
        config, file = self.config.tokenizer, self.folder / SAVED
        if config.given and not file.exists():
            write_durably(file, self._tokenizer_json)
        if config.kind == "bpe" and not file.exists():
            self.report("train tokenizer", 0.0)
            assert config.vocab_size is not None
            texts = (text for domain in domains for text in self._training_texts(domain))
            write_durably(file, train_bpe(texts, config.vocab_size))
        fault_point("build.after_tokenizer")

    def _training_texts(self, domain: str) -> Iterator[str]:
        taken = 0
        folder = inside(self.folder / SCATTERED, domain)
        for keyed, _ in read_in_order(folder, self.config.domain_bytes):
            if keyed and keyed.split(self.config.validation_fraction) == "train":
                taken += len(keyed.data)
                yield keyed.data.decode()
            if taken > BPE_BYTES:
                return

    def _pack(self, domains: list[str]) -> Places:
        target = self.folder / PACKED
        missing = [domain for domain in domains if not inside(target, domain).is_dir()]
        tasks = [Pack(self.config, domain, str(self.folder)) for domain in missing]
        for done, _ in enumerate(self.workers.map(pack, tasks), start=1):
            self.report("tokenize", done / len(tasks))
        fault_point("build.after_pack")
        return {domain: read_facts(inside(target, domain)) for domain in domains}

    def _check_blocks(self, facts: Places) -> None:
        length = self.config.block_tokens
        for domain, found in facts.items():
            for split, packed in (("train", found.train), ("validation", found.validation)):
                if not count_blocks(packed.tokens, length):
                    raise ValueError(
                        f"dataset.block_tokens {length} is more than the {packed.tokens} tokens "
                        f"of {domain}/{split}; choose shorter blocks, another "
                        "validation_fraction, or more documents"
                    )

    def _write_stream(
        self, domain: str, split: str, facts: DomainFacts, tokenizer: Tokenizer
    ) -> Stream:
        final = inside(self.folder, domain, split)
        with open_stage(final) as partial:
            if partial:
                counted = self._write_blocks(partial, domain, split, tokenizer)
                (partial / SOURCE).write_text(json.dumps(counted))
                fault_point("build.stream_written")
        fault_point("build.after_stream")
        packed = facts.train if split == "train" else facts.validation
        shards = _read_shards(final, f"{domain}/{split}")
        blocks = sum(shard.samples for shard in shards)
        assert blocks == count_blocks(packed.tokens, self.config.block_tokens)
        return Stream(
            domain=domain,
            split=split,
            blocks=blocks,
            tokens=blocks * self.config.block_tokens,
            document_bytes=packed.utf8_bytes,
            duplicates=facts.duplicates,
            shards=shards,
            **json.loads((final / SOURCE).read_text()),
        )

    def _write_blocks(
        self, target: Path, domain: str, split: str, tokenizer: Tokenizer
    ) -> dict[str, int]:
        """Write one stream, and count the bytes and documents of its targets."""
        packed, length = inside(self.folder / PACKED, domain), self.config.block_tokens
        shape = columns(length, tokenizer.size)
        types = {key: shape[key].split(":")[1] for key in ("tokens", "documents")}
        done = utf8_bytes = borders = 0
        with _open_writer(target, shape) as writer:
            for tokens, local in iterate_blocks(packed, split, length, tokenizer.size):
                assert int(tokens.max()) < tokenizer.size
                ids = mix(_name_hash(f"{domain}/{split}"), np.arange(done, done + len(tokens)))
                utf8_bytes += int(tokenizer.byte_lengths[tokens[:, 1:]].sum())
                borders += int(local[:, -1].sum())
                done += len(tokens)
                tokens, local = tokens.astype(types["tokens"]), local.astype(types["documents"])
                for block, documents, sample in zip(tokens, local, ids, strict=True):
                    writer.write({"tokens": block, "documents": documents, "sample": sample})
        return {"utf8_bytes": utf8_bytes, "documents": borders + 1}

    def _manifest(
        self, tokenizer: Tokenizer, facts: Places, streams: tuple[Stream, ...]
    ) -> Manifest:
        raw = self.folder / "raw" / SOURCE
        source = json.loads(raw.read_text()) if raw.is_file() else dict(self._read)
        source["beyond_domain_bytes"] = {name: found.beyond_cap for name, found in facts.items()}
        manifest = Manifest(
            config=_plain(self.config),
            vocab_size=tokenizer.size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            block_tokens=self.config.block_tokens,
            source=source,
            streams=streams,
            root_hash="",
        )
        return replace(manifest, root_hash=root_hash(manifest))

    def _reporter(self, stage: str) -> Callable[[float], None]:
        return lambda share: self.report(stage, share)


@contextlib.contextmanager
def _open_writer(target: Path, shape: dict[str, str]) -> Iterator[MDSWriter]:
    """An MDS writer that stops writing after an error."""
    writer = MDSWriter(
        columns=shape,
        out=str(target),
        compression=COMPRESSION,
        hashes=list(HASHES),
        size_limit=SHARD_BYTES,
        max_workers=1,
    )
    try:
        yield writer
    except BaseException:
        writer.cancel_future_jobs()
        raise
    try:
        writer.finish()
    except OSError:
        writer.cancel_future_jobs()
        raise


def _read_shards(folder: Path, name: str) -> tuple[Shard, ...]:
    """The shards of a stream that this build wrote."""
    entries = json.loads((folder / INDEX).read_text())["shards"]
    return tuple(
        Shard(
            name=f"{name}/{entry['raw_data']['basename']}",
            samples=entry["samples"],
            raw_bytes=entry["raw_data"]["bytes"],
            raw_sha256=entry["raw_data"]["hashes"]["sha256"],
            zip_name=f"{name}/{entry['zip_data']['basename']}",
            zip_bytes=entry["zip_data"]["bytes"],
            zip_sha256=entry["zip_data"]["hashes"]["sha256"],
        )
        for entry in entries
    )


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _plain(config: DatasetConfig) -> dict:
    """A config as it looks after a round trip through JSON."""
    return json.loads(json.dumps(asdict(config)))


def _disk_full(config: DatasetConfig, root: Path, partial: Path) -> RuntimeError:
    raw = sum(p.stat().st_size for p in partial.glob("raw/*"))
    given = [] if config.source.kind == "installed" else list_inputs(config.source)
    text = sum(
        p.stat().st_size * (COMPRESSED_TEXT if p.suffix == ".zst" else 1)
        for one in given
        for p in files_of(one)
    )
    text = text or COMPRESSED_TEXT * raw or 3 * (config.domain_bytes or 0)
    return RuntimeError(
        f"the disk is full: building dataset {config.name} takes about "
        f"{DISK_FACTOR * text} bytes, and {shutil.disk_usage(root).free} are free at {root}; "
        "free some disk space and rerun, finished stages are kept"
    )
