"""The E2E set as files, hub data, prompts and token sequences: common/e2e_data.py and e2e/toy_data.py."""

import gzip
import os
import random
from pathlib import Path
from typing import Any

import pytest

from recipes.common.e2e_data import (
    HUB_NAME,
    HUB_REVISION,
    E2ETokens,
    Group,
    Row,
    attributes,
    clean,
    group,
    load_e2e,
    prompt,
    prompt_ids,
    read_csv,
)
from recipes.common.errors import UserError
from recipes.e2e.toy_data import RESTAURANT, general_rows, write_sample

SHARED = Path(os.environ.get("HF_SAI_DATA", Path(__file__).parents[3] / "shared" / "data")) / "e2e"


def write(folder: Path, names: tuple[str, str, str], header: str = "mr,ref") -> None:
    for name in names:
        text = f'{header}\r\n"name[A], area[riverside]","A, by the river."\r\n'
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "dev.csv", "test.csv"),
        ("trainset.csv", "devset.csv", "testset_w_refs.csv"),
        ("train.csv.gz", "dev.csv.gz", "test.csv"),
    ],
)
def test_local_folder(tmp_path: Path, names: tuple[str, str, str]) -> None:
    write(tmp_path, names)
    data = load_e2e(str(tmp_path))
    assert data.train == data.validation == data.test == [Row("name[A], area[riverside]", "A, by the river.")]


def test_local_folder_with_the_hubs_columns(tmp_path: Path) -> None:
    write(tmp_path, ("train.csv", "validation.csv", "test.csv"), "meaning_representation,human_reference")
    assert load_e2e(str(tmp_path)).validation[0].reference == "A, by the river."


@pytest.mark.parametrize("revision", [None, "main"])
def test_hub(monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    """The parquet branch by default: its split and column names are those of the hub's copy."""
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, revision: str | None) -> datasets.DatasetDict:
        asked.extend((name, revision))
        rows = {"meaning_representation": ["name[A]", "name[A]"], "human_reference": ["A.", "It is A."]}
        splits = ("train", "validation", "test")
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_e2e(HUB_NAME, revision)
    assert asked == [HUB_NAME, revision or HUB_REVISION]
    assert data.test == [Row("name[A]", "A."), Row("name[A]", "It is A.")]


@pytest.mark.parametrize("text", [None, " "])
def test_a_hub_row_without_text_is_named(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    import datasets

    rows = {"mr": ["name[A]", "name[A]"], "ref": ["A.", text]}
    splits = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    with pytest.raises(UserError, match="data: owner/name, split train, row 1: empty ref"):
        load_e2e("owner/name")


def test_hub_out_of_reach_names_the_remedy() -> None:
    with pytest.raises(UserError, match=r"could not load nobody/nothing from the hub .* a local folder also does"):
        load_e2e("nobody/nothing")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mr,ref\nname[A],A.\nname[B],\n", "line 3: empty ref"),
        ("mr,ref\n ,A.\n", "line 2: empty mr"),
        ("mr,text\nname[A],A.\n", "no columns mr/ref or meaning_representation/human_reference"),
        ("mr,ref\n", "holds no rows"),
        ("", "no columns"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_csv(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_or_no_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"mr,ref\nname[A],\xff\n")
    (tmp_path / "a.csv.gz").write_bytes(b"mr,ref\n")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=path.name):
            read_csv(path)


def test_missing_split_and_folder(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("mr,ref\nname[A],A.\n")
    with pytest.raises(UserError, match=r"validation split .* looked for dev\.csv, dev\.csv\.gz, devset\.csv"):
        load_e2e(str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        load_e2e(str(tmp_path / "nowhere"))


def test_groups_gather_scattered_rows_in_order() -> None:
    rows = [Row("b", "1"), Row("a", "2"), Row("b", "3")]
    assert group(rows) == [Group("b", ["1", "3"]), Group("a", ["2"])]


def test_prompt_is_the_baselines() -> None:
    mr = (
        "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], "
        "familyFriendly[no], near[Café Adriatic]"
    )
    assert prompt(mr) == (
        "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | "
        "family friendly : no | near : Café Adriatic"
    )


@pytest.mark.parametrize("mr", ["name", "name[A", "name[A] area[B]", "[A]", "name[A], x"])
def test_a_malformed_meaning_representation_is_shown(mr: str) -> None:
    with pytest.raises(UserError, match="must be `attribute"):
        attributes(mr)


def test_sequences_count_the_text_and_its_end(tokenizer: Any) -> None:
    rows = [Row("name[A]", "Is   A.\n"), Row("name[A]", "A.")]
    example = E2ETokens(rows, tokenizer, 64)[0]
    start = prompt_ids(tokenizer, ["name[A]"])[0]
    end = tokenizer.eos_token_id
    assert start == [*tokenizer("name : A")["input_ids"], end]
    target = tokenizer(" Is A.")["input_ids"]
    assert example["input_ids"] == [*start, *target, end]
    assert example["labels"] == [-100] * len(start) + [*target, end]
    assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_long_sequences_are_cut_and_prompts_without_room_refused(tokenizer: Any) -> None:
    rows = [Row("name[A]", "Aaaaaaaaaaaa.")]
    assert [len(E2ETokens(rows, tokenizer, 12)[0][key]) for key in ("input_ids", "labels")] == [12, 12]
    with pytest.raises(UserError, match=r"max_length: 9 tokens leave no room for the text after 'name\[A\]'"):
        E2ETokens(rows, tokenizer, 9)


def test_clean_joins_every_kind_of_white_space() -> None:
    assert clean(" a\u2028b\r\nc\u00a0 d ") == "a b c d"


# ---------------------------------------------------------------- the sample of our own


def test_sample_is_split_by_mr_and_says_what_it_must(tmp_path: Path) -> None:
    data = load_e2e(str(write_sample(tmp_path, train_mrs=60, dev_mrs=10, test_mrs=20)))
    splits = [group(rows) for rows in (data.train, data.validation, data.test)]
    assert [len(groups) for groups in splits] == [60, 10, 20]
    assert len({one.mr for groups in splits for one in groups}) == 60 + 10 + 20  # no MR is in two splits
    several = sum(len(one.references) > 1 for groups in splits for one in groups)
    assert several > 80  # of 90: now and then the grammar has one way only
    for one in (one for groups in splits for one in groups):
        assert [key for key, _ in attributes(one.mr)][1:] == [
            attribute.key for attribute in RESTAURANT if f"{attribute.key}[" in one.mr
        ]
        for key, value in attributes(one.mr):
            assert key == "familyFriendly" or all(value in text for text in one.references), one


def test_sample_is_the_same_each_time(tmp_path: Path) -> None:
    random.seed(5)
    first = write_sample(tmp_path / "a", 5, 5, 5)
    second = write_sample(tmp_path / "b", 5, 5, 5)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in ("train.csv", "test.csv"))
    assert general_rows(20) == general_rows(20)


def test_general_text_never_describes_a_restaurant() -> None:
    rows = general_rows(400)
    tables = [row for row in rows if row.mr]
    assert 150 < len(tables) < 250
    assert not any(part in row.mr for row in tables for part in ("eatType", "food", "priceRange", "familyFriendly"))


# ---------------------------------------------------------------- the real set


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the E2E set: HF_SAI_DATA/e2e")
def test_real_set_has_the_published_counts() -> None:
    data = load_e2e(str(SHARED))
    assert [len(data.train), len(data.validation), len(data.test)] == [42061, 4672, 4693]
    groups = group(data.test)
    assert [len(groups), min(len(one.references) for one in groups), max(len(one.references) for one in groups)] == [
        630,
        1,
        45,
    ]
    assert all(prompt(mr).startswith("name : ") for mr in {row.mr for row in data.train})
