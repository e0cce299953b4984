"""What a user should know of a finished dataset: in what it differs from what was asked."""

from data_pipelines.config import DataConfig
from data_pipelines.manifest import Manifest
from data_pipelines.shares import REPEATED, expected_repeats


def notes_of(manifest: Manifest) -> list[str]:
    """One line for each thing that was left out or called otherwise."""
    source = manifest.source
    notes = [
        f"domain {name!r} is called {folder!r} in dataset {manifest.config['name']}"
        for folder, name in source.get("domain_names", {}).items()
        if folder != name
    ]
    ignored = source.get("left_out", {"files": 0, "names": []})
    if ignored["files"]:
        notes.append(
            f"{ignored['files']} files in source.paths were left out, since they are not of its "
            f"kind: {_some(ignored['names'], ignored['files'])}"
        )
    empty = source.get("inputs_without_documents", [])
    if empty:
        notes.append(f"no document is in {_some(empty[:SHOWN], len(empty))}")
    if source.get("empty_documents"):
        notes.append(f"{source['empty_documents']} documents without text were left out")
    return [*notes, *_splits(manifest)]


def _splits(manifest: Manifest) -> list[str]:
    """Domains of whose text another share is held out than was asked, as by one long document."""
    notes, asked = [], manifest.config["validation_fraction"]
    for domain in manifest.domains:
        kept, held = (
            manifest.stream(domain, split).document_bytes for split in ("train", "validation")
        )
        share = held / max(kept + held, 1)
        # Documents are drawn whole, so the share in bytes scatters around the one asked.
        if share > max(3 * asked, 0.1 + asked):
            notes.append(
                f"domain {domain} holds out {share:.0%} of its bytes, where validation_fraction "
                f"asks for {asked:.0%}: long documents fell to validation; split them, or choose "
                "another dataset.seed"
            )
    return notes


def repeat_notes(corpus: DataConfig, manifest: Manifest, tokens: int) -> list[str]:
    """One line for each domain that a run of so many tokens reads more than once.

    Raises:
        ValueError: the dataset lacks a domain, or has less text than `unique_bytes`.
    """
    return [
        f"W-REPEAT: corpus {corpus.name} reads each block of {domain} {found.times:.2f} times on "
        f"average ({found.blocks:.0f} blocks from {found.available} in {tokens} tokens)"
        for domain, found in expected_repeats(corpus, manifest, tokens).items()
        if found.times > REPEATED
    ]


SHOWN = 5


def _some(names: list[str], count: int) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(names) + more
