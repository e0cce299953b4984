import json
import random

import numpy
import pytest
import zstandard

from data_pipelines.config import SourceConfig
from data_pipelines.extract import is_worth_reading, take_docstrings
from data_pipelines.installed import ORIGIN_SHARE, collect, survey
from data_pipelines.sources import (
    Input,
    folder_name,
    list_inputs,
    read_input,
    read_jsonl,
    read_text_folder,
)
from data_pipelines.workers import open_workers


def line(text, domain="Pile-CC"):
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode() + b"\n"


def test_plain_and_compressed_files_hold_the_same_documents(tmp_path):
    content = b"".join(line(f"text {i} \u00e9") for i in range(2000)) + b"\n" + line("last")[:-1]
    (tmp_path / "a.jsonl").write_bytes(content)
    frames = [zstandard.compress(content[:777]), zstandard.compress(content[777:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    plain = [(d.domain, d.text) for d in read_jsonl(tmp_path / "a.jsonl")]
    packed = [(d.domain, d.text) for d in read_jsonl(tmp_path / "a.jsonl.zst")]
    assert plain == packed
    assert len(plain) == 2001
    assert plain[0] == ("Pile-CC", "text 0 \u00e9")


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[]",
        b'"text"',
        b'{"text": "a"}',
        b'{"text": 3, "meta": {"pile_set_name": "a"}}',
        b'{"text": "\\ud800", "meta": {"pile_set_name": "a"}}',
        b'{"text": "a", "meta": {"pile_set_name": "/"}}',
        b'{"text": "a", "meta": {"pile_set_name": 3}}',
        b'{"text": "\xff", "meta": {"pile_set_name": "a"}}',
        b"[" * 100_000,
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, bad):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(line("fine") + b"\n" + bad + b"\n" + line("fine"))
    with pytest.raises(RuntimeError, match=r"bad\.jsonl line 3 "):
        list(read_jsonl(file))


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.sources.MAX_LINE_BYTES", 1 << 20)
    file = tmp_path / "long.jsonl"
    file.write_bytes(line("fine") + b"x" * (4 << 20))
    with pytest.raises(RuntimeError, match=r"long\.jsonl line 2 is longer than"):
        list(read_jsonl(file))


def test_a_decompression_bomb_is_refused(tmp_path):
    file = tmp_path / "bomb.jsonl.zst"
    file.write_bytes(zstandard.compress(b"\n" * (600 << 20)))
    with pytest.raises(RuntimeError, match=r"bomb\.jsonl\.zst has \d+ bytes and decompresses"):
        list(read_jsonl(file))


@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_a_broken_compressed_file_is_refused(tmp_path, damage):
    noise = random.Random(0).randbytes(200_000).hex()
    data = zstandard.compress(line(noise) + line("last"))
    file = tmp_path / "broken.jsonl.zst"
    file.write_bytes(data[:-8] if damage == "truncated" else b"\0" * 100 + data[100:])
    with pytest.raises(RuntimeError, match=r"broken\.jsonl\.zst .*download it"):
        list(read_jsonl(file))


def test_each_folder_of_texts_is_a_domain(tmp_path):
    for domain, name in (("law", "b.txt"), ("law", "a/c.txt"), ("code", "x.py")):
        (tmp_path / domain / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / domain / name).write_text(f"{domain} {name}")
    inputs = list_inputs(SourceConfig("text_folder", (str(tmp_path),)))
    read = [(d.domain, d.text) for given in inputs for d in read_input(given)]
    assert read == [("code", "code x.py"), ("law", "law a/c.txt"), ("law", "law b.txt")]


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RuntimeError, match=r"latin\.txt is not UTF-8"):
        list(read_text_folder(tmp_path))


def test_paths_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list_inputs(SourceConfig("jsonl", (str(tmp_path / "none"),)))
    with pytest.raises(ValueError, match="holds nothing for kind jsonl"):
        list_inputs(SourceConfig("jsonl", (str(tmp_path),)))


def test_an_environment_without_a_lock_file_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"requirements\.lock does not exist, .* restore it"):
        survey(tmp_path / "requirements.lock")


def test_departures_from_the_lock_file_are_told(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# comment\nnumpy==0.0.1 \\\n    --hash=sha256:00\nno-such-package==1.0\nzstandard\n"
    )
    found = survey(lock)
    assert list(found.packages) == ["numpy"]
    assert found.deviations == (
        "no-such-package==1.0 is not installed",
        f"numpy is {numpy.__version__}, not 0.0.1",
    )


def test_only_locked_packages_and_the_standard_library_are_read(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"numpy=={numpy.__version__}\ncrossladder==0.1.0\n")
    pieces = []
    with open_workers(1) as workers:
        came = collect(survey(lock), 60_000, workers, pieces.append, lambda _: None)
    assert {piece.origin.partition(":")[0] for piece in pieces} == {"numpy", "python"}
    assert len({piece.digest for piece in pieces}) == len(pieces)
    for domain, share in ORIGIN_SHARE.items():
        mine = [p for p in pieces if p.domain == domain]
        assert sum(len(p.text.encode()) for p in mine) == came[domain].utf8_bytes <= 60_000
        of_numpy = [p for p in mine if p.origin.startswith("numpy:numpy/_core/include")]
        assert sum(len(p.text.encode()) for p in of_numpy) <= share * 60_000


def test_folder_names_of_the_pile_stay_readable():
    assert folder_name("Wikipedia (en)", "") == "Wikipedia-en"
    assert folder_name("OpenWebText2", "") == "OpenWebText2"
    assert "/" not in folder_name("../../evil", "")
    assert not folder_name("../../evil", "").startswith(".")


def test_a_file_can_be_given_by_itself(tmp_path):
    (tmp_path / "one.jsonl").write_bytes(line("text"))
    given = list_inputs(SourceConfig("jsonl", (str(tmp_path / "one.jsonl"),)))
    assert given == [Input(str(tmp_path / "one.jsonl"), "jsonl")]


SOURCE = '''"""Module text that is long enough to be kept among the prose of the corpus."""
import os


class A:
    """Class text that is long enough to be kept among the prose of the corpus."""

    def f(self):
        """Function text that is long enough to be kept.

            Indented, it goes on for more than a line.
        And further.
        """

    def g(self):
        r"""Short."""
        text = """not a docstring"""
        return text


def one(): """On the line of its definition, which cannot be taken out alone."""
'''


def test_docstrings_are_parted_from_code_that_still_parses():
    code, prose = take_docstrings(SOURCE)
    compile(code, "code", "exec")
    assert "Module text" not in code
    assert "Class text" not in code
    assert "Short" not in code
    assert "not a docstring" in code
    assert "On the line" in code
    assert prose.startswith("Module text")
    assert prose.index("Class text") < prose.index("Function text")
    assert "\n\n    Indented" in prose
    assert "Short" not in prose


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("ordinary words in some lines\n" * 20, True),
        ("short", False),
        ("// @generated by a tool\n" + "ordinary words in some lines\n" * 20, False),
        ("0x13, 0x44, 0x21, 0x99,\n" * 40, False),
        ("word " * 400, False),
        ("\n" * 500, False),
        ("ordinary words \ud800 in some lines\n" * 20, False),
    ],
)
def test_generated_and_empty_texts_are_left_out(text, worth):
    assert is_worth_reading(text, "python") == worth
