"""What a dataset was built from: names, files that are left out, files that change afterwards."""

import json
import os
from pathlib import Path

import pytest
import yaml
import zstandard

from data_pipelines.build import build_dataset
from data_pipelines.config import SourceConfig, TokenizerConfig, domain_folder
from data_pipelines.notes import notes_of
from data_pipelines.sources import Input, files_of, read_jsonl, read_text_folder
from data_pipelines.tokenizers import train_bpe
from tests.data_pipelines.conftest import (
    DOMAINS,
    corpus,
    dataset_config,
    make_documents,
    silent,
    write_shards,
)

TEXTS = make_documents(120, 7)


def build(source, root, **changes):
    if isinstance(source, SourceConfig):
        changes["source"] = source
    return build_dataset(dataset_config(source, **changes), root, processes=1, report=silent)


def write_texts(folder, domains):
    for domain, texts in domains.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(texts):
            (folder / domain / f"{i}.txt").write_bytes(text.encode())
    return folder


def text_source(folder):
    return SourceConfig("text_folder", (str(folder),))


@pytest.mark.parametrize(
    "names",
    [
        ("New York", "New-York"),
        ("a/b", "a-b"),
        ("caf\u00e9", "cafe\u0301"),
        ("(en)", "en"),
        ("C++", "C"),
        ("x", " x "),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_domains_that_would_become_one_are_refused(tmp_path, names, shards):
    source = write_shards(tmp_path / "s", dict.fromkeys(names, TEXTS), shards=shards)
    with pytest.raises(RuntimeError, match="would both be called") as raised:
        build(source, tmp_path)
    assert all(repr(name) in str(raised.value) for name in names)


def test_domains_in_two_files_that_would_become_one_are_refused(tmp_path):
    source = write_shards(tmp_path / "s", {"New York": TEXTS}, shards=1)
    (source / "00.jsonl").rename(source / "a.jsonl")
    write_shards(source, {"New-York": TEXTS}, shards=1)
    with pytest.raises(RuntimeError, match=r"'New-York' and 'New York' would both be called"):
        build(source, tmp_path)


def test_letters_of_every_script_keep_domains_apart(tmp_path):
    names = ["\u65b0\u95fbA", "\u8bba\u6587A", "\u0440\u0443\u0441", "A"]
    texts = {name: make_documents(60, i) for i, name in enumerate(names)}
    manifest = build(write_shards(tmp_path / "s", texts), tmp_path)
    assert manifest.domains == sorted(names)
    shares = dict.fromkeys(names, 0.25)
    assert corpus(domains=shares).domains == shares


def test_a_domain_written_as_in_the_data_is_told_its_name():
    assert domain_folder("Wikipedia (en)") == "Wikipedia-en"
    with pytest.raises(ValueError, match=r"'Wikipedia \(en\)' cannot .* called 'Wikipedia-en'"):
        corpus(domains={"Wikipedia (en)": 1.0})


PILE = """ArXiv|BookCorpus2|Books3|DM Mathematics|Enron Emails|EuroParl|FreeLaw|Github|
Gutenberg (PG-19)|HackerNews|NIH ExPorter|OpenSubtitles|OpenWebText2|PhilPapers|Pile-CC|
PubMed Abstracts|PubMed Central|StackExchange|USPTO Backgrounds|Ubuntu IRC|Wikipedia (en)|
YoutubeSubtitles""".replace("\n", "").split("|")
"""Gao et al. 2020, table 1, as pile_set_name writes them."""


def test_the_shipped_corpora_name_domains_of_the_pile():
    sweep = yaml.safe_load(Path("sweeps/scaling.yaml").read_text())["corpora"]["pile"]
    known = {domain_folder(name) for name in PILE}
    assert len(known) == len(PILE) == 22
    for mixture in sweep["mixtures"].values():
        assert set(mixture["domains"]) <= known
        assert sweep["neutral_set"] in mixture["domains"]


@pytest.mark.parametrize(
    "name", ["", "-", "...", "x" * 101, "\u6f22" * 34, "MANIFEST.json", "tokenizer.json", "a.tmp"]
)
def test_a_name_that_can_be_no_folder_is_refused(name):
    with pytest.raises(ValueError, match="cannot be a folder name"):
        domain_folder(name)


def test_an_empty_compressed_file_is_no_empty_shard(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"a\.jsonl\.zst has 0 bytes.*download it again"):
        list(read_jsonl(tmp_path / "a.jsonl.zst"))


def test_what_is_left_out_is_named_and_counted(tmp_path):
    source = write_shards(tmp_path / "s", DOMAINS)
    (source / "nothing.jsonl").write_bytes(b"\n\n")
    (source / "none.jsonl.zst").write_bytes(zstandard.compress(b""))
    (source / "more").mkdir()
    for name in ("more/x.jsonl", "x.json", "y.jsonl.gz", "z.JSONL"):
        (source / name).write_text("{}")
    (source / ".hidden").write_text("")
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    row = {"text": "", "meta": {"pile_set_name": "alpha"}}
    (source / "blank.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    manifest = build(source, tmp_path)
    facts = manifest.source
    assert facts["left_out"]["files"] == 5
    assert facts["empty_documents"] == 2
    expected = ["blank.jsonl", "none.jsonl.zst", "nothing.jsonl"]
    assert facts["inputs_without_documents"] == [str(source / name) for name in expected]
    told = "\n".join(notes_of(manifest))
    for part in ("5 files", "gone.jsonl", "y.jsonl.gz", "nothing.jsonl", "2 documents without"):
        assert part in told


def test_a_clean_dataset_has_no_notes(shards, tmp_path):
    assert notes_of(build(shards, tmp_path)) == []


def test_linked_folders_are_read_once_each(tmp_path):
    write_texts(tmp_path / "elsewhere", {"more": ["linked"]})
    folder = write_texts(tmp_path / "texts", {"law": ["plain"]}) / "law"
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "file.txt").symlink_to(tmp_path / "elsewhere/more/0.txt")
    read = [document.text for document in read_text_folder(folder)]
    assert sorted(read) == ["linked", "linked", "plain"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write_texts(tmp_path, {"law/sub": ["text"]})

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PermissionError, match="law"):
        files_of(Input(str(tmp_path / "law"), "text_folder"))


def test_line_ends_of_a_text_are_kept(tmp_path):
    write_texts(tmp_path, {"law": ["a\r\nb\rc\n"]})
    assert [d.text for d in read_text_folder(tmp_path / "law")] == ["a\r\nb\rc\n"]


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def rewrite(path):
    data = path.read_bytes()
    place = data.index(b"scan")
    path.write_bytes(data[:place] + b"scam" + data[place + 4 :])


CHANGES = {
    "grew": (lambda s: grow(s / "00.jsonl"), r"00\.jsonl had \d+ bytes and has \d+"),
    "shrank": (lambda s: (s / "00.jsonl").write_bytes(b"\n"), r"00\.jsonl had \d+ bytes and has 1"),
    "other content": (lambda s: rewrite(s / "01.jsonl"), r"01\.jsonl has other content"),
    "new": (lambda s: (s / "02.jsonl").write_text("\n"), r"02\.jsonl is new"),
    "gone": (lambda s: (s / "01.jsonl").unlink(), r"01\.jsonl is missing"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_files_that_changed_after_the_build_are_named(tmp_path, change):
    source = write_shards(tmp_path / "s", DOMAINS)
    build(source, tmp_path)
    act, message = CHANGES[change]
    act(source)
    with pytest.raises(ValueError, match=rf"built from other files: .*{message}.* delete"):
        build(source, tmp_path)


@pytest.mark.parametrize("change", ["grew", "new", "gone", "linked"])
def test_texts_that_changed_after_the_build_are_named(tmp_path, change):
    folder = write_texts(tmp_path / "texts", {"law": TEXTS})
    build(text_source(folder), tmp_path)
    if change == "grew":
        grow(folder / "law/3.txt")
    elif change == "new":
        (folder / "law/new.txt").write_text("new")
    elif change == "gone":
        (folder / "law/3.txt").unlink()
    else:
        write_texts(tmp_path / "elsewhere", {"more": ["linked"]})
        (folder / "law/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"texts/law had \d+ (files|bytes) and has \d+"):
        build(text_source(folder), tmp_path)


def test_files_that_were_touched_moved_or_deleted_after_the_build_do_not_matter(tmp_path):
    source = write_shards(tmp_path / "s", DOMAINS)
    built = build(source, tmp_path)
    os.utime(source / "00.jsonl", ns=(1, 1))
    assert build(source, tmp_path) == built
    for file in source.iterdir():
        file.unlink()
    source.rmdir()
    assert build(source, tmp_path) == built


def test_another_tokenizer_file_after_the_build_is_named(shards, tmp_path):
    file = tmp_path / "given.json"
    tokenizer = TokenizerConfig("file", str(file), 300)
    file.write_text(train_bpe(iter(DOMAINS["alpha"]), 300))
    built = build(shards, tmp_path, tokenizer=tokenizer)
    assert build(shards, tmp_path, tokenizer=tokenizer) == built
    file.write_text(train_bpe(iter(DOMAINS["beta"][::-1]), 300))
    with pytest.raises(ValueError, match=r"tokenizer\.path .*given\.json holds another tokenizer"):
        build(shards, tmp_path, tokenizer=tokenizer)


def test_a_line_of_many_lists_is_refused_before_they_are_made(tmp_path):
    file = tmp_path / "many.jsonl"
    row = '{"text": "%s", "meta": {"pile_set_name": "a"}, "other": [%s]}\n'
    file.write_text(row % ("[" * 200_000, "[]"))
    assert len(list(read_jsonl(file))) == 1
    file.write_text(row % ("a", ",".join(["[]"] * 200_000)))
    with pytest.raises(RuntimeError, match=r"many\.jsonl line 1 .*200003 lists and mappings"):
        list(read_jsonl(file))


def test_a_small_file_cannot_ask_for_a_large_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()
    file = tmp_path / "window.jsonl.zst"
    file.write_bytes(stream.compress(b'{"text": "a"}') + stream.flush())
    with pytest.raises(RuntimeError, match=r"window\.jsonl\.zst cannot be decompressed"):
        list(read_jsonl(file))
