"""Read a table file of any supported format, with an error that says what is wrong."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

LARGEST_FILE = 2**31


def read_raw(path: Path) -> pd.DataFrame:
    """A file as a frame; cells of a CSV stay text, so that no type is guessed.

    Raises:
        ValueError: it is missing, too large, not text in UTF-8, or of another format.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a .csv, .tsv, .parquet or .jsonl file")
    if path.stat().st_size > LARGEST_FILE:
        size = path.stat().st_size / 2**30
        raise ValueError(f"{path} has {size:.1f} GiB; at most 2 are read, so thin the table first")
    try:
        frame = _parsed(path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}); save it again as UTF-8"
        ) from error
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not len(frame) or not len(frame.columns):
        raise ValueError(f"{path} holds no rows; export it again with its data")
    names = pd.Series([str(name).strip() for name in frame.columns])
    if names.duplicated().any():
        twice = listed(names[names.duplicated()])
        raise ValueError(f"{path} has columns of one name ({twice}); rename one of each pair")
    frame.columns = pd.Index(names)
    return frame


def _parsed(path: Path) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        frame = pd.read_csv(
            path, dtype=str, keep_default_na=False, sep=separator, encoding="utf-8-sig",
            header=None, skip_blank_lines=True,
        )  # fmt: skip
        # With a header row pandas renames doubled names in silence.
        frame.columns = pd.Index(frame.iloc[0].astype(str))
        return frame.iloc[1:].reset_index(drop=True)
    if suffix == ".parquet":
        return pd.read_parquet(path)
    if suffix in (".jsonl", ".ndjson"):
        return _of_lines(path)
    raise ValueError(f"{suffix or 'no'} suffix is not known; use .csv, .tsv, .parquet or .jsonl")


def _of_lines(path: Path) -> pd.DataFrame:
    """JSON lines, each a flat object; whole numbers keep their digits."""
    records = []
    with path.open(encoding="utf-8") as lines:
        for place, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict) or any(
                isinstance(value, (dict, list)) for value in record.values()
            ):
                raise ValueError(f"line {place} is not a flat object; flatten it first")
            records.append(record)
    return pd.DataFrame(records, dtype=object)


def listed(names: Iterable[object]) -> str:
    """Names for a message, at most 60."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - 60} more" if len(texts) > 60 else ""
    return ", ".join(texts[:60]) + more
