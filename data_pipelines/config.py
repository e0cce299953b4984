"""The config classes of datasets and corpora; imports no torch and holds no machine's paths."""

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of datasets, which become folder names."""
MAX_NAME_BYTES = 100
RESERVED = re.compile(r"MANIFEST\.json|STATE\.json|tokenizer\.json|.*\.tmp")
"""Names of files of a dataset, and of stages that are not finished."""

LONGEST_LABEL = 200
LABEL_RULE = f"write 1 to {LONGEST_LABEL} printable characters without $ and \\"
SHARE_TOLERANCE = 1e-6

TokenizerKind = Literal["bytes", "bpe", "file", "lossy_file"]


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    # A default factory leaves no class attribute, which config loaders take for a fixed kind.
    kind: TokenizerKind = field(default_factory=lambda: "bytes")
    """bytes for UTF-8 bytes, bpe for byte-level BPE trained on the dataset, file for a tokenizer
    that is brought along, lossy_file for one that may change the text, such as to lower case: bits
    per byte are then those of the changed text, and marked."""
    path: str | None = None
    """For kinds file and lossy_file: the JSON file of a Hugging Face tokenizer, relative to the
    working directory."""
    vocab_size: int | None = None
    """Ids in all, the document separator included; at least 258. For kind bytes null, since it has
    always 257."""

    def __post_init__(self) -> None:
        if self.kind not in ("bytes", "bpe", "file", "lossy_file"):
            raise ValueError(
                f"tokenizer.kind {self.kind!r} is unknown; choose bytes, bpe, file or lossy_file"
            )
        if (self.path is not None) != self.given:
            raise ValueError(
                f"tokenizer.path is {self.path!r} with kind {self.kind}; "
                "a path goes with kinds file and lossy_file, and only with them"
            )
        if self.kind == "bytes" and self.vocab_size not in (None, 257):
            raise ValueError(
                f"tokenizer.vocab_size is {self.vocab_size}, but kind bytes has 257 ids; "
                "leave it out or choose kind bpe"
            )
        if self.kind != "bytes" and (self.vocab_size is None or self.vocab_size < 258):
            raise ValueError(
                f"tokenizer.vocab_size is {self.vocab_size} with kind {self.kind}, which needs "
                "256 bytes, a special id and more; give at least 258"
            )

    @property
    def given(self) -> bool:
        """Whether it is a file that is brought along."""
        return self.kind in ("file", "lossy_file")

    @property
    def lossless(self) -> bool:
        """Whether its ids stand for exactly the text, which a build checks."""
        return self.kind != "lossy_file"


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    kind: Literal["installed", "jsonl", "text_folder"]
    """installed for the source code and documentation of the installed Python packages, jsonl for
    .jsonl or .jsonl.zst files in the Pile's format, text_folder for one sub-folder per domain."""
    paths: tuple[str, ...] = ()
    """Files or folders to read; none for kind installed."""

    def __post_init__(self) -> None:
        if self.kind not in ("installed", "jsonl", "text_folder"):
            raise ValueError(
                f"source.kind {self.kind!r} is unknown; choose installed, jsonl or text_folder"
            )
        if bool(self.paths) == (self.kind == "installed"):
            raise ValueError(
                f"source.paths is {list(self.paths)} with kind {self.kind}; "
                "give paths for jsonl and text_folder, none for installed"
            )


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset: tokenized, packed into blocks, and split into training and validation."""

    name: str
    """Name of its folder below execution.data_root."""
    source: SourceConfig
    """Where its documents come from."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How its text becomes tokens."""
    block_tokens: int = 512
    """Tokens of a packed block, 2 to 2^24; sequences are cut from blocks or joined of them."""
    domain_bytes: int | None = None
    """Most UTF-8 bytes of documents per domain; null for all."""
    validation_fraction: float = 0.02
    """Share of the documents held out for evaluation, between 0 and 1, chosen by their hash."""
    seed: int = 17
    """Seed of the split and of the order of documents, 0 or more."""

    def __post_init__(self) -> None:
        _require_name("dataset.name", self.name)
        if not 2 <= self.block_tokens <= 1 << 24:
            raise ValueError(
                f"dataset.block_tokens {self.block_tokens} is out of range; choose 2 to {1 << 24}"
            )
        if self.domain_bytes is not None and self.domain_bytes < 1:
            raise ValueError(
                f"dataset.domain_bytes {self.domain_bytes} leaves nothing; give a positive number"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"dataset.validation_fraction {self.validation_fraction} leaves one side empty; "
                "choose a value between 0 and 1, such as 0.02"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"dataset.seed {self.seed} is out of range; choose 0 or more")


@dataclass(frozen=True)
class DataConfig:
    """What a run reads: a corpus, mixed from the domains of one dataset."""

    name: str
    """Name of the corpus, for reports."""
    dataset: str
    """Name of the dataset that it is mixed from."""
    tokenizer: TokenizerConfig
    """The dataset's tokenizer."""
    domains: dict[str, float]
    """Share of each domain in every epoch; the shares sum to 1."""
    seq_len: int
    """Tokens of a training sequence; divides block_tokens or is a multiple of it. Shorter sequences
    are cut from one block, longer ones join consecutive blocks of a domain."""
    block_tokens: int
    """The dataset's block_tokens."""
    epoch_blocks: int
    """Blocks per epoch, after which they are shuffled anew; blocks joined into one sequence stay
    together."""
    unique_bytes: int | None = None
    """UTF-8 bytes of distinct training text, over all domains by their shares; null for all there
    is. A smaller corpus is a subset of a larger one."""
    shuffle_seed: int = 17
    """Seed of the order of blocks, 0 to 2^31 - 1."""
    num_canonical_nodes: int = 1
    """MosaicML Streaming's num_canonical_nodes: part of what defines the order of blocks, whatever
    the number of machines."""

    def __post_init__(self) -> None:
        if not is_label(self.name):
            raise ValueError(f"corpus.name {self.name[:80]!r} is no name; {LABEL_RULE}")
        _require_name("corpus.dataset", self.dataset)
        self._require_shares()
        if min(self.seq_len, self.block_tokens) < 1 or min(
            self.block_tokens % self.seq_len, self.seq_len % self.block_tokens
        ):
            raise ValueError(
                f"corpus.seq_len {self.seq_len} does not divide block_tokens "
                f"{self.block_tokens}, nor is it a multiple of it; choose either"
            )
        for key in ("epoch_blocks", "num_canonical_nodes"):
            if getattr(self, key) < 1:
                raise ValueError(f"corpus.{key} {getattr(self, key)} is below 1; raise it")
        if self.epoch_blocks % self.joined_blocks:
            raise ValueError(
                f"corpus.seq_len {self.seq_len} joins {self.joined_blocks} blocks, which do not "
                f"divide epoch_blocks {self.epoch_blocks}; make that a multiple"
            )
        if self.epoch_groups % self.num_canonical_nodes:
            raise ValueError(
                f"corpus.num_canonical_nodes {self.num_canonical_nodes} does not divide "
                f"the epoch's {self.epoch_groups} blocks or groups of joined ones; choose a divisor"
            )
        if self.unique_bytes is not None and self.unique_bytes < 1:
            raise ValueError(
                f"corpus.unique_bytes {self.unique_bytes} leaves nothing; give a positive number"
            )
        if not 0 <= self.shuffle_seed < 1 << 31:
            raise ValueError(
                f"corpus.shuffle_seed {self.shuffle_seed} is out of range; choose 0 to 2^31 - 1"
            )

    @property
    def pieces(self) -> int:
        """Sequences cut from one block; 1 where blocks are joined."""
        return max(self.block_tokens // self.seq_len, 1)

    @property
    def joined_blocks(self) -> int:
        """Consecutive blocks that become one sequence; 1 where blocks are cut or left whole."""
        return max(self.seq_len // self.block_tokens, 1)

    @property
    def epoch_groups(self) -> int:
        """Groups of joined blocks in an epoch."""
        return self.epoch_blocks // self.joined_blocks

    def _require_shares(self) -> None:
        for domain, share in self.domains.items():
            _require_domain(domain)
            if not 0 < share <= 1:
                raise ValueError(
                    f"corpus.domains.{domain} is {share}, which is not a share; "
                    "choose a value above 0 and up to 1, or leave the domain out"
                )
        total = sum(self.domains.values())
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"corpus.domains sum to {total:.6g}; make the shares sum to 1")


def domain_folder(name: object) -> str:
    """The name that a domain has in a dataset: runs of other characters become a dash.

    Raises:
        ValueError: it is no text, nothing is left of it, or it is too long or the name of a file.
    """
    folded = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
    folder = re.sub(r"[^\w.]+", "-", folded).strip("-.")
    if not folder or len(folder.encode()) > MAX_NAME_BYTES or RESERVED.fullmatch(folder):
        raise ValueError(
            f"the domain {str(name)[:MAX_NAME_BYTES]!r} cannot be a folder name: it needs letters "
            f"or digits, at most {MAX_NAME_BYTES} bytes, and may not be called as a dataset's own "
            "files; rename it"
        )
    return folder


def _require_domain(name: str) -> None:
    if domain_folder(name) != name:
        raise ValueError(
            f"a key of corpus.domains {name!r} cannot be a folder name; in a dataset this domain "
            f"is called {domain_folder(name)!r}, write that"
        )


def is_label(name: str) -> bool:
    """Whether a name can stand in tables and figures, without characters of formulas."""
    whole = name.strip() and name.isprintable() and len(name) <= LONGEST_LABEL
    return bool(whole) and not set(name) & set("$\\")


def _require_name(key: str, name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise ValueError(
            f"{key} {name!r} cannot be a folder name; use letters, digits, dot, dash and underscore"
        )
