"""What a user should know of a finished dataset: in what it differs from what was asked."""

from data_pipelines.manifest import Manifest


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
    return notes


SHOWN = 5


def _some(names: list[str], count: int) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(names) + more
