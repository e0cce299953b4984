import importlib
import itertools
import json
import os
import random
import shutil

import numpy as np
import pytest

import data_pipelines.fault_points
from data_pipelines.build import build_dataset
from data_pipelines.config import DataConfig, DatasetConfig, SourceConfig, TokenizerConfig

WORDS = [
    "scan",
    "kernel",
    "na\u00efve",
    "token",
    "\u2192",
    "state",
    "of",
    "the",
    "mixer",
    "ladder",
    "\n",
]


def silent(stage, share):
    del stage, share


def make_documents(count, seed):
    """Texts of very different lengths, with some that are equal."""
    draw = random.Random(seed)
    texts = [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(0, 120))) for i in range(count)]
    return texts + draw.sample(texts, count // 20)


def write_shards(folder, domains, shards=2):
    """Documents of several domains, mixed over some files in the Pile's format."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": domain}})
        for domain, texts in domains.items()
        for text in texts
    ]
    random.Random(0).shuffle(lines)
    for i in range(shards):
        (folder / f"{i:02d}.jsonl").write_text("\n".join(lines[i::shards]) + "\n")
    return folder


DOMAINS = {"alpha": make_documents(260, 1), "beta": make_documents(200, 2)}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), DOMAINS)


def die_at(fault, action):
    """Run an action in a forked process under a fault; returns how the process ended."""
    child = os.fork()
    if child == 0:
        os.environ["CROSSLADDER_FAULT"] = fault
        importlib.reload(data_pipelines.fault_points)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dataset_config(shards, **changes):
    given = {
        "name": "tiny",
        "source": SourceConfig("jsonl", (str(shards),)),
        "block_tokens": 64,
        "domain_bytes": None,
        "validation_fraction": 0.1,
        "seed": 3,
    }
    return DatasetConfig(**{**given, **changes})


@pytest.fixture(scope="session")
def built_root(shards, tmp_path_factory):
    """A root with the tiny dataset, built once; tests that damage it take a copy."""
    root = tmp_path_factory.mktemp("datasets")
    build_dataset(dataset_config(shards), root, processes=1, report=silent)
    return root


@pytest.fixture
def copied_root(built_root, tmp_path):
    """A private copy of the tiny dataset, never opened before."""
    root = tmp_path / "copied"
    shutil.copytree(built_root, root, ignore=shutil.ignore_patterns("*.mds"))
    return root


def corpus(**changes):
    given = {
        "name": "mixed",
        "dataset": "tiny",
        "tokenizer": TokenizerConfig(),
        "domains": {"alpha": 0.75, "beta": 0.25},
        "seq_len": 64,
        "block_tokens": 64,
        "epoch_blocks": 96,
    }
    return DataConfig(**{**given, **changes})


def read_blocks(folder, block_tokens=64, token_type="<u2"):
    """The samples of all decompressed shards of a stream, parsed by the format's description."""
    layout = [
        ("documents", "<u2", block_tokens + 1),
        ("sample", "<u8"),
        ("tokens", token_type, block_tokens + 1),
    ]
    rows = []
    for path in sorted(folder.glob("*.mds")):
        data = path.read_bytes()
        count = int.from_bytes(data[:4], "little")
        bounds = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        rows += [np.frombuffer(data[b:e], layout)[0] for b, e in itertools.pairwise(bounds)]
    return rows
