"""Fixtures of the data tests: a tokenizer that is trained on the sample text, and shards of the sample."""

from pathlib import Path

import pytest

from pgolf.data.build import ShardsJob, build_shards
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "sample.model"
    texts = (document.text for document in iterate_documents(sample_paths().train))
    return train_tokenizer(texts, path, vocab_size=1024)


@pytest.fixture(scope="session")
def cased(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with the operators of CaseOps."""
    path = tmp_path_factory.mktemp("caseops") / "caseops.model"
    texts = (document.text for document in iterate_documents(sample_paths().train))
    return train_tokenizer(texts, path, vocab_size=1024, with_caseops=True)


@pytest.fixture(scope="session")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with the operators of CaseOps and marker pairs."""
    path = tmp_path_factory.mktemp("paired") / "paired.model"
    texts = (document.text for document in iterate_documents(sample_paths().train))
    return train_tokenizer(texts, path, vocab_size=1024, with_caseops=True, marker_pairs=True)


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    out = tmp_path_factory.mktemp("sample") / "shards"
    sample = sample_paths()
    job = ShardsJob(
        train=(sample.train,),
        val=(sample.val,),
        tokenizer=tokenizer.path,
        out=out,
        shard_tokens=100_000,
        jobs=1,
    )
    build_shards(job, report=lambda line: None)
    return out
