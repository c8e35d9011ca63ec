"""The comparison page: every figure where it belongs, nothing in a record becomes markup, no file beside the page."""

import base64
import copy
import re
from html.parser import HTMLParser

import pytest

from recipes.common.errors import UserError
from recipes.common.files import write_json
from recipes.common.records import label
from recipes.pretrain.compare import HEADER, compare, read_record, unique_labels

HOSTILE = '<script>alert("x")</script> | a\nb `c` $\\frac{ ![i](http://x) & _d_'


@pytest.fixture
def record():
    def rows(start):
        return [
            {"step": step, "tokens": step * 1000, "seconds": step * 0.5, "loss": start - 0.1 * step}
            for step in range(1, 6)
        ]

    return {
        "recipe": "pretrain",
        "config": {"optim": "sgd_sai", "optim_args": "scaling=raw", "learning_rate": 0.01, "seed": 3, "block_size": 64},
        "tokens": 5000,
        "train_seconds": 2.5,
        "processes": 1,
        "final": {"train_loss": 4.5, "eval_loss": 4.25, "eval_perplexity": 70.1},
        "diverged": False,
        "speed": {
            "step_ms": 12.34,
            "step_ms_quartiles": [11.0, 13.0],
            "optimizer_ms": 1.25,
            "optimizer_share": 0.1,
            "tokens_per_second": 2000.4,
        },
        "optimizer_state_bytes": 3 * 2**20,
        "peak_memory_bytes": 700 * 2**20,
        "curves": {"train": rows(5.0), "validation": rows(5.1)},
        "machine": {"cpu": "Test CPU", "torch_threads": 1},
        "versions": {"torch": "2.13.0"},
    }


@pytest.fixture
def page(tmp_path):
    """Writes records and returns the folder of their comparison."""

    def build(*records, title="Runs"):
        paths = [write_json(tmp_path / f"{i}.json", record) for i, record in enumerate(records)]
        return compare(paths, tmp_path / "page", title)

    return build


class Parsed(HTMLParser):
    """The tags, attributes and table cells of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.cells, self.text = [], [], [], ""
        self._cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self._cell = tag in ("td", "th")
        if self._cell:
            self.cells.append("")

    def handle_endtag(self, tag):
        self._cell = False

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.cells[-1] += data


def test_table_holds_the_figures_of_each_record(page, record):
    other = copy.deepcopy(record)
    other["config"] |= {"optim": "adamw_torch", "optim_args": None, "learning_rate": 0.001}
    other["final"]["eval_loss"] = 4.0
    folder = page(record, other)
    cells = Parsed((folder / "comparison.html").read_text()).cells
    columns = len(HEADER)
    assert cells[:columns] == list(HEADER)
    assert cells[columns : 2 * columns] == [
        *("sgd_sai, scaling=raw, lr 0.01", "5,000", "4.500", "4.250", "70.1", "3.00"),
        *("12.3 (11.0 to 13.0)", "1.25 (10.0 %)", "2,000", "700", "2.5"),
    ]
    assert cells[2 * columns] == "adamw_torch, lr 0.001"
    assert cells[2 * columns + 3] == "4.000"
    assert len(cells) == 3 * columns


def test_both_forms_of_the_page_say_the_same(page, record):
    folder = page(record, record)
    markdown = (folder / "comparison.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    html_cells = Parsed((folder / "comparison.html").read_text()).cells
    assert [cell for row in table for cell in row] == html_cells
    for name in re.findall(r"\]\((.+?)\)", markdown):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_in_a_record_becomes_markup(page, record):
    record["config"] |= {"optim_args": HOSTILE, "seed": HOSTILE, "block_size": [HOSTILE]}
    record["machine"]["cpu"] = HOSTILE
    record["versions"]["torch"] = HOSTILE
    harmless = copy.deepcopy(record)
    harmless["config"] |= {"optim_args": "x", "seed": 1, "block_size": 2}
    harmless["machine"]["cpu"] = harmless["versions"]["torch"] = "x"
    expected = Parsed((page(harmless, title="x") / "comparison.html").read_text())
    folder = page(record, title=HOSTILE)
    parsed = Parsed((folder / "comparison.html").read_text())
    assert parsed.tags == expected.tags
    assert "script" not in parsed.tags
    assert parsed.cells[len(HEADER)] == label(record)
    assert parsed.text.count(HOSTILE) >= 4  # title, heading, cell and notes show it as it is

    markdown = (folder / "comparison.md").read_text()
    bare = re.sub(r"\\.", "", markdown)  # what is left when the escaped characters are gone
    assert "<script" not in bare
    assert "](http" not in bare
    rows = [line for line in bare.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {len(HEADER) + 1}


def test_html_needs_no_other_file_and_no_network(page, record):
    parsed = Parsed((page(record) / "comparison.html").read_text())
    sources = [value for _, name, value in parsed.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 2
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)


def test_runs_with_the_same_name_are_told_apart(record):
    assert unique_labels([record, record]) == [
        "sgd_sai, scaling=raw, lr 0.01 (1)",
        "sgd_sai, scaling=raw, lr 0.01 (2)",
    ]


def test_diverged_run_is_shown(page, record):
    diverged = copy.deepcopy(record)
    diverged["diverged"] = True
    diverged["final"] = {"train_loss": float("nan"), "eval_loss": float("inf"), "eval_perplexity": None}
    diverged["curves"]["train"][-1]["loss"] = float("nan")
    cells = Parsed((page(diverged, record) / "comparison.html").read_text()).cells
    assert cells[len(HEADER) + 2 : len(HEADER) + 5] == ["diverged", "diverged", "-"]


def test_settings_are_sorted_into_shared_and_different(page, record):
    other = copy.deepcopy(record)
    other["config"]["learning_rate"] = 0.03
    text = Parsed((page(record, other) / "comparison.html").read_text()).text
    assert "The same in all runs: block_size 64, optim sgd_sai, optim_args scaling=raw, seed 3" in text
    assert "Different: learning_rate" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a run record in JSON"),
        ("[1, 2]", "must be a record of recipes.pretrain, but lacks config, curves"),
        ('{"config": {}}', "must be a record of recipes.pretrain, but lacks curves, final"),
        (b"\xff\xfe", "must be a run record in JSON"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"broken.json {message}"):
        compare([path], tmp_path / "page")
    assert not (tmp_path / "page").exists()
    with pytest.raises(UserError, match=r"nowhere.json: No such file"):
        read_record(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"at least one record"):
        compare([], tmp_path / "page")
