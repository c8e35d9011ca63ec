"""README.md and docs/ agree with the records, with the Makefile and with the files they name; their snippets run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from markdown_it import MarkdownIt
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_sai import SGDSaI
from hf_sai.bench.state_bytes import optimizer_state_bytes
from recipes.common.errors import UserError
from recipes.common.provenance import sealed
from recipes.sweep import tables
from recipes.sweep.tables import rates, rewritten, sharded_memory, sharded_steps, speed, sweep, versus

ROOT = Path(__file__).parent.parent
PAGES = tables.pages()
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# In the pages and in what a contributor reads.
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").rglob("README.md"))]
TEXT = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
BLOCK = re.compile(r"<!-- table: \w+ [\w ]+ -->\n.*?<!-- end -->", re.DOTALL)
TABLES = [block for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


# ---------------------------------------------------------------- tables


@PAGE
def test_tables_agree_with_the_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run: python -m recipes.sweep.tables"
    assert text.count("<!-- table:") == text.count("<!-- end -->") == len(BLOCK.findall(text)), "a marker is misspelt"


@pytest.mark.parametrize("block", TABLES, ids=lambda block: block.splitlines()[0])
def test_a_changed_number_is_noticed(block: str) -> None:
    numbers = re.findall(r"\d+\.\d+", block)
    assert numbers
    for number in dict.fromkeys(numbers):
        assert rewritten(block.replace(number, "9.9", 1)) == block


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speeed bench", r"table: speeed bench: speeed must be one of sweep, rates, versus, .*, sharded_memory, "),
        ("sweep nothing", r"table: sweep nothing: sweep needs nothing\.json"),
    ],
)
def test_a_table_without_a_record_is_an_error(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewritten(f"<!-- table: {name} -->\n<!-- end -->")


def row(run: str, rate: float, value: float | None, seed: int = 0, state: int = 2_000_000) -> dict[str, Any]:
    point = {"learning_rate": rate}
    return {"run": run, "point": point, "seed": seed, "value": value, "optimizer_state_bytes": state, "device": "a CPU"}


def test_the_table_of_a_sweep() -> None:
    """The best point, marked at an edge; mean and range over seeds; what has diverged, in the grid and at length."""
    ours = [row("ours", rate, value, state=1_234_000) for rate, value in ((1e-3, 2.0), (1e-2, 1.5), (1e-1, None))]
    theirs = [row("theirs", 0.5, 1.75)]
    finals = [
        row("ours", 1e-2, value, seed) | {"scores": {"bleu": value / 2}} for seed, value in enumerate((1.5, 1.75))
    ]
    best = {
        "ours": {"point": {"learning_rate": 1e-2}, "value": 1.5, "at_edge": []},
        "theirs": {"point": {"learning_rate": 0.5}, "value": 1.75, "at_edge": ["learning_rate"]},
    }
    record = {
        "metric": "final.eval_loss",
        "best": best,
        "runs": [*ours, *theirs],
        "finals": finals,
        "origins": "Rows of 2 commits (a, b).",
        "sweep": "s.yaml",
    }
    assert sweep(record).splitlines() == [
        "|  | learning rate | eval_loss (range) | bleu | diverged | state kB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| ours | 0.01 | 1.625 (1.500 to 1.750) | 0.812 | 1 of 5 | 1,234 |",
        "| theirs | 0.5 (edge) | 1.750 | - | 0 of 1 | 2,000 |",
        "",
        "The best point of each optimizer's grid, then 2 seeds of it: mean and range. a CPU. "
        "Rows of 2 commits (a, b). `python -m recipes.sweep s.yaml`",
    ]
    finals[1]["value"] = None
    assert "| ours | 0.01 | diverged | 0.812 | 2 of 5 | 1,234 |" in sweep(record)
    accuracy = record | {"metric": "final.eval_top1", "finals": []}
    assert "| ours | 0.01 | 150.0 | 1 of 3 | 1,234 |" in sweep(accuracy)
    assert "eval_top1, % (range)" in sweep(accuracy)


def two_optimizers() -> dict[str, Any]:
    """Three rates with two seeds each; at the last one a run of ours diverged."""
    losses = {"AdamW": {1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}, "SGD-SaI": {1e-3: 1.5, 2e-3: 1.25, 4e-3: None}}
    states = {"AdamW": 1000, "SGD-SaI": 500}
    runs = [
        row(name, rate, None if value is None else value + seed / 2, seed, states[name])
        for name, own in losses.items()
        for rate, value in own.items()
        for seed in range(2)
    ]
    return {"sweep": "pretrain5m_sweep.yaml", "runs": runs, "finals": []}


def test_the_table_of_every_rate() -> None:
    assert rates(two_optimizers()).splitlines() == [
        "| learning rate | AdamW | SGD-SaI |",
        "| --- | ---: | ---: |",
        "| 0.001 | 2.250 (2.000 to 2.500) | 1.750 (1.500 to 2.000) |",
        "| 0.002 | 1.250 (1.000 to 1.500) | 1.500 (1.250 to 1.750) |",
        "| 0.004 | 3.250 (3.000 to 3.500) | 2 of 2 diverged |",
        "",
        "Mean and range, 2 seeds each. a CPU. `python -m recipes.sweep pretrain5m_sweep.yaml`",
    ]


def test_the_table_of_sgd_sai_beside_adamw() -> None:
    """At AdamW's best rate, of those with equally many seeds, at least two; one row a job."""
    record = two_optimizers()
    job = "GPT-2 5.4 M from scratch, 1 M tokens"
    best = f"| {job} | 0.002 | 1.250 (1.000 to 1.500) | 1.500 (1.250 to 1.750) | +20.0 % | 0.500 | 2 |"
    assert versus(record).splitlines()[2:4] == [best, ""]
    record["runs"] = [r for r in record["runs"] if r["point"] != {"learning_rate": 2e-3} or r["seed"] == 0]
    assert "| 0.001 (edge) | 2.250 (2.000 to 2.500) | 1.750 (1.500 to 2.000) | -22.2 % |" in versus(record)


def test_the_table_of_a_benchmark() -> None:
    """Rows of the first model, whichever part of the record they stand in; what was not measured is left out."""

    def one(optimizer: str, step_ms: float | None, quartiles: tuple[float, float] | None = None) -> dict[str, Any]:
        figures = {"step_ms": step_ms, "quartiles_ms": quartiles, "first_step_ms": 80.0, "state_bytes": 996_000_000}
        return {"optimizer": optimizer, "title": optimizer.upper(), "steps": 20, **figures}

    model = {"model": "gpt2", "title": "GPT-2", "dtype": "float32", "threads": 2}
    results = [
        model | {"rows": [one("adamw_fused", 40.0, (39.0, 41.0)), one("other", None)]},
        model | {"rows": [one("slow", 100.0)]},
        model | {"dtype": "bfloat16", "rows": [one("else", 1.0)]},
    ]
    record = {"results": results, "machine": {"cpu": "a CPU"}, "versions": {"torch": "2.13"}}
    assert speed(record).splitlines() == [
        "| GPT-2, float32 | step ms (quartiles) | / AdamW fused | first ms | state MB |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ADAMW_FUSED | 40 (39 to 41) | 1.00 | 80 | 996 |",
        "| SLOW | 100 | 2.50 | 80 | 996 |",
        "",
        "Median of 20 steps or fewer, 2 threads; a CPU, torch 2.13.",
    ]


def test_the_tables_of_a_sharded_model() -> None:
    """AdamW beside SGD-SaI; the largest temporary of any step; a record that was edited is refused."""

    def step(peak: int, **collectives: dict[str, int]) -> dict[str, Any]:
        return {"collectives": collectives, "read_bytes": peak, "written_bytes": 10**9, "peak_bytes": peak}

    def one(optimizer: str, state: int, beside: int, steps: dict[str, Any]) -> dict[str, Any]:
        sizes = {"parameter_bytes": 2 * 10**9, "gradient_bytes": 10**9}
        sizes |= {"state_bytes": state, "beside_state_bytes": beside}
        return {"model": "7b", "devices": 8, "optimizer": optimizer, **sizes, "steps": steps}

    reduced = {"number": 2, "bytes": 1_500_000}
    first = {"collectives": {"allreduce_": reduced}}
    ours = {"first": first, "calibration": step(3 * 10**9, allreduce_=reduced), "ordinary": step(10**9)}
    ours["measuring"] = step(10**9, allreduce_=reduced)
    theirs = {"first": {"collectives": {}}, "ordinary": step(2 * 10**9)}
    rows = [one("AdamW", 4 * 10**9, 0, theirs), one("SGD-SaI", 2 * 10**9, 10**9, ours)]
    config, versions = {"dtype": "float32"}, {"torch": "2.13"}
    record = sealed({"recipe": "s", "command": "c", "config": config, "versions": versions, "rows": rows})
    memory = "| 7B on 8 | 3.00 | 4.00 | 3.00 | 0.750 | 7.00 | 6.00 | 2.00 | 3.00 |"
    assert sharded_memory(record).splitlines()[2] == memory
    cell = "2 (1.50 MB)"
    steps = f"| 7B on 8 | none | none | {cell} | {cell} | {cell} | 3.0 | 2.0 | 4.0 |"
    assert sharded_steps(record).splitlines()[2] == steps
    assert "collectives: allreduce_. float32, torch 2.13. `c`" in sharded_steps(record)
    with pytest.raises(UserError, match="the record of 's' was edited: its digest differs; make it again"):
        sharded_memory(record | {"command": "d"})


# ---------------------------------------------------------------- what they name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@TEXT
def test_lines_are_short_except_in_tables(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    made = {line for block in TABLES for line in block.splitlines()}
    assert [line for line in lines if len(line) > 120 and not line.startswith("|") and line not in made] == []


@TEXT
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ *|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


@TEXT
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "recipes|accelerate_configs|hf_sai|tests|docs"
    named = set(re.findall(rf"\b((?:{folders})/[\w/.-]+\.(?:py|yaml|json|png|md))", text))
    named |= {f"recipes/{name}" for name in re.findall(r"python -m recipes\.(\w+)", text)}
    named = {name for name in named if not re.search(r"\b(NAME|JOB)\b", name)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_readme_of_a_job_names_its_configurations_and_files() -> None:
    for folder in (ROOT / "recipes").iterdir():
        if not (folder / "__init__.py").exists():
            continue
        text = (folder / "README.md").read_text(encoding="utf-8")
        own = [*folder.rglob("*.yaml"), *(path for path in folder.glob("*.py") if "__" not in path.name)]
        assert [path.name for path in own if f"`{path.name}`" not in text] == []


@TEXT
def test_links_lead_somewhere(page: Path) -> None:
    tokens = [inner for token in MarkdownIt().parse(page.read_text(encoding="utf-8")) for inner in token.children or []]
    targets = {str(token.attrGet("href") or token.attrGet("src")) for token in tokens if token.attrs}
    relative = {target.partition("#")[0] for target in targets if not re.match(r"https?://|mailto:|None$", target)}
    assert {target for target in relative if not (page.parent / target).exists()} == set()


@pytest.mark.parametrize(
    ("shapes", "share"),
    [
        pytest.param([(768, 2304), (2304,), (768, 768), (768, 3072), (3072, 768)], 0.5, id="the weights of GPT-2"),
        pytest.param([(4, 768), (2304, 4)], 0.625, id="LoRA of rank 4"),
    ],
)
def test_the_state_has_the_size_that_the_readme_says(shapes: list[tuple[int, ...]], share: float) -> None:
    sizes = []
    for optimizer_class in (SGDSaI, torch.optim.AdamW):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = optimizer_class(params, lr=1e-3)
        optimizer.step()
        sizes.append(optimizer_state_bytes(optimizer))
    assert sizes[0] / sizes[1] == pytest.approx(share, rel=0.01)


# ---------------------------------------------------------------- snippets


def snippets(page: Path) -> list[str]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == "python"]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_[a-z]+)?` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each with what the earlier ones have made; every optimizer that they make is ours."""
    from tokenizers import Tokenizer, models

    monkeypatch.chdir(tmp_path)
    for name, value in {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abc"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained("tiny")
    config = GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained("tiny")
    data = Dataset.from_dict({"input_ids": [[2, 3, 4]] * 8, "labels": [[2, 3, 4]] * 8})
    names: dict[str, Any] = {"data": data, "texts": Dataset.from_dict({"text": ["a b c"] * 8})}
    makes_its_model = any(code.startswith("model = ") or "\nmodel = " in code for code in snippets(page))
    for code in snippets(page):
        if "trl" in code:
            pytest.importorskip("trl")
        if not makes_its_model:
            names["model"] = "tiny" if "SFTTrainer" in code else GPT2LMHeadModel.from_pretrained("tiny")
        made = [name for name in ("optimizer", "trainer") if re.search(rf"^{name} = ", code, re.MULTILINE)]
        code = code.replace('SFTConfig("out", ', 'SFTConfig("out", bf16=False, ')  # TRL's default is for GPUs
        exec(compile(code, page.name, "exec"), names)
        for name in made:
            optimizer = names["optimizer"] if name == "optimizer" else names["trainer"].create_optimizer()
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper of one that has trained
            assert isinstance(optimizer, SGDSaI)
            expected = ("raw", 1e-2) if "scaling=raw" in code else ("adamw", 2e-4)
            assert (optimizer.param_groups[0]["scaling"], optimizer.defaults["lr"]) == expected
            assert any(group["token_rows"] for group in optimizer.param_groups)


def test_the_readme_has_a_snippet_for_each_way() -> None:
    assert len(snippets(ROOT / "README.md")) == 4
