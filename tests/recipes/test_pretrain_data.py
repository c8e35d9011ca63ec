"""The data of the pretraining recipe: nothing lost, nothing leaked, bounded memory, a cache that goes on."""

import csv
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.common.errors import UserError
from recipes.pretrain import data
from recipes.pretrain.data import (
    IGNORED,
    PackedBlocks,
    StreamedBlocks,
    split_stream,
    tokenize_corpus,
    train_tokenizer,
)
from recipes.pretrain.text import Corpus

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HF_SAI_DATA", ROOT / ".." / "shared" / "data")).resolve()


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(200)]
    return [f"{i}: {' '.join(rng.choices(words, k=rng.randint(5, 60)))}, größer, 中\nend" for i in range(120)]


@pytest.fixture
def jsonl(tmp_path, texts):
    return write_jsonl(tmp_path / "text.jsonl", texts)


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("tokenizer") / "text.jsonl", texts)
    return train_tokenizer(Corpus(train_files=[path], validation_fraction=0), 400, 10**9)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def expected_tokens(tokenizer, texts):
    end = tokenizer.token_to_id("<|endoftext|>")
    return [token for text in texts for token in [*tokenizer.encode(text).ids, end]]


def documents_of(tokenizer, tokens):
    """The texts between the end-of-text tokens."""
    end = tokenizer.token_to_id("<|endoftext|>")
    assert tokens[-1] == end
    documents, current = [], []
    for token in tokens:
        if token == end:
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(int(token))
    return documents


def test_split_by_document_keeps_every_document_once(tmp_path, texts, jsonl, tokenizer):
    corpus = Corpus(train_files=[jsonl], validation_fraction=0.2)
    files = tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cache")
    train, validation = (documents_of(tokenizer, files[name].load()) for name in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert (len(train), len(validation)) == (files["train"].documents, files["validation"].documents)
    assert 10 <= len(validation) <= 40  # 24 expected, binomial: 3.6 standard deviations either way
    assert files["train"].tokens + files["validation"].tokens == len(expected_tokens(tokenizer, texts))


def test_another_split_seed_holds_out_other_documents(tmp_path, jsonl, tokenizer):
    held_out = []
    for seed in (0, 1):
        corpus = Corpus(train_files=[jsonl], validation_fraction=0.2, split_seed=seed)
        files = tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cache")
        held_out.append(set(documents_of(tokenizer, files["validation"].load())))
    assert held_out[0] != held_out[1]


def test_training_documents_that_are_also_validation_documents_are_left_out(tmp_path, texts, jsonl, tokenizer, caplog):
    validation = write_jsonl(tmp_path / "validation.jsonl", ["only here", texts[3], texts[77]])
    files = tokenize_corpus(Corpus([jsonl], [validation]), tokenizer, 0, tmp_path / "cache")
    remaining = [text for i, text in enumerate(texts) if i not in (3, 77)]
    assert files["train"].load().tolist() == expected_tokens(tokenizer, remaining)
    assert documents_of(tokenizer, files["validation"].load()) == ["only here", texts[3], texts[77]]
    assert "2 training documents" in caplog.text


def test_equal_documents_fall_on_the_same_side(tmp_path, texts, tokenizer):
    path = write_jsonl(tmp_path / "twice.jsonl", texts + texts)
    files = tokenize_corpus(Corpus([path], validation_fraction=0.3), tokenizer, 0, tmp_path / "cache")
    train, validation = (set(documents_of(tokenizer, files[name].load())) for name in ("train", "validation"))
    assert not train & validation


def test_every_format_gives_the_same_tokens(tmp_path, texts, jsonl, tokenizer):
    paths = {"jsonl": jsonl}
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    paths["parquet"] = str(tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *enumerate(texts)])
    paths["csv"] = str(tmp_path / "a.csv")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(Path(jsonl).read_text())
    paths["gz"] = str(tmp_path / "b.jsonl.gz")
    expected = expected_tokens(tokenizer, texts)
    for name, path in paths.items():
        files = tokenize_corpus(Corpus([path], validation_fraction=0), tokenizer, 0, tmp_path / name)
        assert files["train"].load().tolist() == expected, name


def test_text_file_with_a_separator(tmp_path, texts, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts), encoding="utf-8")
    corpus = Corpus([str(path)], validation_fraction=0, document_separator="<|endoftext|>")
    assert list(corpus.documents()) == [text + "\n" for text in texts]


@pytest.mark.parametrize("gap", ["\n\n", "\n", " "], ids=["paragraphs", "lines", "one endless line"])
def test_text_file_without_marks_is_cut_without_loss(tmp_path, gap):
    text = gap.join(f"sentence {i} of a book" for i in range(60_000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    documents = list(Corpus([str(path)], validation_fraction=0).documents())
    assert "".join(documents) == text
    assert len(documents) > 1
    if gap == "\n\n":
        assert all(document.endswith("\n") for document in documents[:-1])
        assert max(map(len, documents)) < 17_000


def test_the_mark_inside_a_document_is_text(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["one <|endoftext|> two", "three"])
    tokens = tokenize_corpus(Corpus([path], validation_fraction=0), tokenizer, 0, tmp_path / "cache")["train"].load()
    assert (tokens == 0).sum() == 2
    assert documents_of(tokenizer, tokens) == ["one <|endoftext|> two", "three"]


def test_two_processes_write_the_same_file(tmp_path, jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 1000)  # 20 units of work
    corpus = Corpus([jsonl], validation_fraction=0.1)
    written = [
        tokenize_corpus(corpus, tokenizer, 0, tmp_path / str(processes), processes)["train"].path.read_bytes()
        for processes in (1, 2)
    ]
    assert written[0] == written[1]


def test_killed_tokenisation_goes_on_where_it_stopped(tmp_path, jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 1000)
    corpus = Corpus([jsonl], validation_fraction=0.1)
    encode = data.encode
    calls, killed_at = 0, None

    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(data, "encode", counted)
    whole = tokenize_corpus(corpus, tokenizer, 0, tmp_path / "whole")
    needed, calls, killed_at = calls, 0, 10
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cut")
    with open(next((tmp_path / "cut").glob("*/train.bin")), "ab") as file:
        file.write(b"half a batch")  # written, but the kill came before the note of it
    resumed = tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cut")
    for name in ("train", "validation"):
        assert resumed[name].path.read_bytes() == whole[name].path.read_bytes()
        assert resumed[name].documents == whole[name].documents
    assert calls == needed + 1  # only the batch at which the kill came was done again


def test_second_start_reads_no_text(tmp_path, jsonl, tokenizer, monkeypatch):
    corpus = Corpus([jsonl], validation_fraction=0.1)
    first = tokenize_corpus(corpus, tokenizer, 0, tmp_path)
    monkeypatch.setattr(Corpus, "documents", lambda *args, **kwargs: pytest.fail("the text was read again"))
    assert tokenize_corpus(corpus, tokenizer, 0, tmp_path) == first


def test_changed_text_is_tokenised_again(tmp_path, texts, jsonl, tokenizer):
    corpus = Corpus([jsonl], validation_fraction=0)
    before = tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cache")["train"]
    write_jsonl(Path(jsonl), texts[:50])
    after = tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cache")["train"]
    assert (before.documents, after.documents) == (120, 50)
    assert after.load().tolist() == expected_tokens(tokenizer, texts[:50])


def test_vocabulary_over_65536_takes_four_bytes_a_token(tmp_path, texts, jsonl, tokenizer):
    large = type(tokenizer).from_str(tokenizer.to_str())
    large.add_tokens([f"[{i}]" for i in range(70_000)])
    files = tokenize_corpus(Corpus([jsonl], validation_fraction=0), large, 0, tmp_path / "cache")
    assert files["train"].dtype == "uint32"
    assert files["train"].load().tolist() == expected_tokens(tokenizer, texts)


@given(length=st.integers(2, 300), block_size=st.integers(2, 40))
def test_every_token_but_the_first_is_predicted_once(length, block_size):
    tokens = np.arange(length, dtype=np.uint16)
    blocks = PackedBlocks(tokens, block_size)
    predicted = []
    for i in range(len(blocks)):
        block = blocks[i]
        assert block["input_ids"].shape == block["labels"].shape == (block_size,)
        kept = block["labels"] != IGNORED
        assert torch.equal(block["input_ids"][kept], block["labels"][kept])
        predicted += block["labels"][kept].tolist()
        assert not kept[0]  # has no token before it, and must not be counted
        assert kept[1]  # no block without anything to predict
        assert i == len(blocks) - 1 or kept[1:].all()
    assert predicted == list(range(1, length))
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize("block_size", [2, 7, 64])
def test_streamed_blocks_are_the_packed_blocks(tmp_path, jsonl, tokenizer, monkeypatch, block_size):
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 1000)
    corpus = Corpus([jsonl], validation_fraction=0)
    packed = PackedBlocks(tokenize_corpus(corpus, tokenizer, 0, tmp_path)["train"].load(), block_size)
    streamed = StreamedBlocks(corpus.documents(), tokenizer, 0, block_size)
    count = 0
    for i, block in enumerate(streamed):
        assert torch.equal(block["labels"], packed[i]["labels"])
        count += 1
    assert count == len(packed)


def test_streamed_split_holds_out_the_first_documents(tmp_path, texts, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[4]])  # a held-out document comes again later
    stream, validation = split_stream(Corpus([path]), tokenizer, 0, 10)
    assert documents_of(tokenizer, validation) == texts[:10]
    assert list(stream) == texts[10:]
    assert list(stream) == texts[10:]  # an epoch later


def test_trained_tokenizer_sees_no_validation_text(tmp_path, jsonl, texts):
    corpus = Corpus([jsonl], validation_fraction=0.3)
    seen = [text for text in texts if not corpus.held_out(corpus.digest(text))]
    (tmp_path / "other").mkdir()
    alone = Corpus([write_jsonl(tmp_path / "other" / "seen.jsonl", seen)], validation_fraction=0)
    assert train_tokenizer(corpus, 500, 10**9).get_vocab() == train_tokenizer(alone, 500, 10**9).get_vocab()


def test_trained_tokenizer_has_the_size_asked_for_and_loses_nothing(tokenizer):
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    text = "tabs\tand\nlines, é, 中文, 🙂 and \u0000"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_max_documents(tmp_path, jsonl, texts):
    assert list(Corpus([jsonl], max_documents=7).documents()) == texts[:7]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n \n", "a.txt holds no text"),
        ("a.csv", b"", "a.csv holds no text"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.txt", b"fine\nbroken \xff here\n", "a.txt must be UTF-8.*0xff.*iconv"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl must be UTF-8.*0xe9"),
        ("a.csv", b"text\ncaf\xe9 and more\n", "a.csv must be whole CSV in UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', r"a.jsonl, line 1: no string 'text' \(text_column\) in \['content'\]"),
        ("a.csv", b"content\nx\n", r"a.csv: text_column must be one of \['content'\], got 'text'"),
        ("a.pdf", b"%PDF", r"a.pdf must end in one of .parquet, .jsonl, .csv, .txt, got '.pdf'"),
    ],
)
def test_bad_files_are_named(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    corpus = Corpus([str(tmp_path / name)], validation_fraction=0)
    with pytest.raises(UserError, match=message):
        tokenize_corpus(corpus, tokenizer, 0, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/index.json"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"train_files: no file at '.*nowhere-\*.txt'"):
        list(Corpus([str(tmp_path / "nowhere-*.txt")]).documents())


def test_no_network_names_the_option():
    with pytest.raises(UserError, match=r"dataset: 'Skylion007/openwebtext' could not be read.*train_files"):
        next(Corpus(dataset="Skylion007/openwebtext").documents(streaming=True))


def test_corpus_needs_one_source():
    with pytest.raises(UserError, match="exactly one of train_files"):
        Corpus()
    with pytest.raises(UserError, match=r"validation_fraction must be in \[0, 1\), got 1.5"):
        Corpus(["a.txt"], validation_fraction=1.5)


def test_empty_validation_split_is_refused(tmp_path, jsonl, tokenizer):
    with pytest.raises(UserError, match=r"the validation split has no document.*validation_fraction"):
        tokenize_corpus(Corpus([jsonl], validation_fraction=1e-9), tokenizer, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "pretrain").is_dir(), reason="needs HF_SAI_DATA")
@pytest.mark.timeout(900)
def test_188_megabytes_in_bounded_memory(tmp_path):
    code = f"""
import resource, time
from transformers import AutoTokenizer
from recipes.pretrain.data import tokenize_corpus
from recipes.pretrain.text import Corpus
tokenizer = AutoTokenizer.from_pretrained({str(DATA / "gpt2_tokenizer")!r})
folder = {str(DATA / "pretrain")!r}
corpus = Corpus([folder + "/train-*.parquet"], [folder + "/validation.parquet"])
began = time.perf_counter()
files = tokenize_corpus(corpus, tokenizer.backend_tokenizer, tokenizer.eos_token_id, {str(tmp_path)!r})
print(files["validation"].tokens - files["validation"].documents, files["train"].documents,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - began)
"""
    results = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        results.append([float(word) for word in done.stdout.split()])
    tokens, documents, memory, _ = results[0]
    assert (tokens, documents) == (480732, 25590)  # as the data set's own README counts them
    assert memory < 2 * 2**30
    assert results[1][3] < results[0][3] / 5  # the second reads what the first has kept
