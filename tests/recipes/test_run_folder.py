"""One way to resume, one guard of a run's folder, and what Ctrl-C leaves: run_folder.py and interrupt.py in common."""

from recipes.common.start import run_main

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.common import interrupt
from recipes.common.config import parse_config
from recipes.common.errors import UserError
from recipes.common.files import check_writable
from recipes.common.optimizers import RecipeArguments
from recipes.common.run_folder import LOCK, checkpoint_to_resume, run_folder
from recipes.diffusion.config import DiffusionArguments
from recipes.pretrain.train import PretrainArguments
from recipes.pretrain.train import run as pretrain

ROOT = Path(__file__).parents[2]


def none() -> str | None:
    return None


@pytest.mark.parametrize("word", ["last", "true", "True", True, "auto"])
def test_every_word_finds_the_last_checkpoint(tmp_path: Path, word: Any) -> None:
    assert checkpoint_to_resume(word, tmp_path, lambda: "found") == "found"


@pytest.mark.parametrize("word", [None, "", "false", "False", False, "none"])
def test_no_word_begins_at_the_start(tmp_path: Path, word: Any) -> None:
    assert checkpoint_to_resume(word, tmp_path, none) is None


def test_without_a_checkpoint_auto_begins_and_last_is_refused(tmp_path: Path) -> None:
    assert checkpoint_to_resume("auto", tmp_path, none) is None
    for word in ("last", "true"):
        with pytest.raises(UserError, match=r"there is no whole checkpoint in output_dir '.+'; `auto` begins at the"):
            checkpoint_to_resume(word, tmp_path, none)


def test_a_path_is_taken_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-3"), tmp_path, none) == str(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match=r"resume_from_checkpoint: there is no folder 'lastt'; `last` finds the last"):
        checkpoint_to_resume("lastt", tmp_path, none)


def earlier(folder: Path) -> dict[str, str]:
    """A folder after a run: two checkpoints, a record, and a file of the user's."""
    for name in ("checkpoint-5", "checkpoint-12"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").touch()
    for name in ("record.json", "notes.txt"):
        (folder / name).write_text(name)
    return {"last": str(folder / "checkpoint-12")}


def test_a_folder_with_an_earlier_run_is_refused_and_stays(tmp_path: Path) -> None:
    last = earlier(tmp_path)["last"]
    before = sorted(path.name for path in tmp_path.iterdir())
    with (
        pytest.raises(
            UserError,
            match=r"holds checkpoint-12 of an earlier run: resume it with --resume_from_checkpoint last, "
            r"start over with --overwrite_output_dir true, or give another output_dir",
        ),
        run_folder(tmp_path, None, lambda: last),
    ):
        pytest.fail("entered")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("word", [None, "auto"])
def test_a_finished_run_without_checkpoints_is_not_done_over(tmp_path: Path, word: str | None) -> None:
    (tmp_path / "record.json").touch()
    with pytest.raises(UserError, match=r"holds record\.json of an earlier run: start over with --overwrite"):
        checkpoint_to_resume(word, tmp_path, none)


def test_overwrite_removes_the_runs_files_only(tmp_path: Path) -> None:
    last = earlier(tmp_path)["last"]
    with run_folder(tmp_path, None, lambda: last, overwrite=True) as checkpoint:
        assert checkpoint is None
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "notes.txt"]


def test_a_run_that_resumes_overwrites_nothing(tmp_path: Path) -> None:
    last = earlier(tmp_path)["last"]
    with run_folder(tmp_path, "last", lambda: last, overwrite=True) as checkpoint:
        assert checkpoint == last
        assert {"checkpoint-5", "checkpoint-12", "record.json"} <= {path.name for path in tmp_path.iterdir()}


def test_two_runs_at_once_the_second_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with run_folder(folder, None, none):
        code = (
            "import sys\nfrom recipes.common.run_folder import run_folder\n"
            f"with run_folder({str(folder)!r}, None, lambda: None): print('entered')"
        )
        other = python(code)
        assert "is in use by another run; wait for it, or give another output_dir" in other.stderr
        assert "entered" not in other.stdout
        assert folder.is_dir()  # the second does not take away what the first has made
    with run_folder(folder, None, none):
        pass
    assert list(folder.iterdir()) == []


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_lock_of_a_killed_run_holds_nothing_up(tmp_path: Path) -> None:
    code = (
        "import os\nfrom recipes.common.run_folder import run_folder\n"
        f"with run_folder({str(tmp_path)!r}, None, lambda: None): os._exit(9)"
    )
    assert python(code).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    with run_folder(tmp_path, None, none):
        pass


def test_a_failed_run_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "a" / "b", None, none):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_what_was_there_or_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "a", None, none):
        1 / 0  # noqa: B018
    with pytest.raises(FileExistsError), run_folder(tmp_path / "b", None, none):
        [(tmp_path / "b" / "checkpoint-1").mkdir() for _ in range(2)]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "b", "b/checkpoint-1"]


def test_the_check_for_writing_makes_nothing(tmp_path: Path) -> None:
    check_writable("record", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [RecipeArguments, PretrainArguments, DiffusionArguments])
def test_every_recipe_has_the_two_options(kind: type, tmp_path: Path) -> None:
    own = ["--data", "x", "--concept_init", "dog"] if kind is DiffusionArguments else []
    (tmp_path / "c.yaml").write_text("resume_from_checkpoint: true\noverwrite_output_dir: true\n")
    for words in (
        ["--config", str(tmp_path / "c.yaml")],
        ["--resume_from_checkpoint=last", "--overwrite_output_dir=1"],
    ):
        (args,) = parse_config([kind], [*own, "--output_dir", str(tmp_path), *words])
        assert str(args.resume_from_checkpoint).lower() in ("true", "last")
        assert args.overwrite_output_dir is True


# ---------------------------------------------------------------- Ctrl-C


def interrupted(work: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """What a program prints whose `work` gets a SIGINT."""
    with pytest.raises(SystemExit) as left:
        run_main(work)
    assert left.value.code == 130
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _watchers_end() -> Any:
    """A guarded program that was interrupted ends its process in time: in these tests it must not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_SECONDS", 1e6)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


@pytest.mark.usefixtures("_patient")
def test_the_line_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["python3", "-m", "recipes.x", "--config", "a b.yaml", "--resume_from_checkpoint", "auto", "--seed", "1"]
    monkeypatch.setattr(sys, "orig_argv", words)
    saved: list[str] = []

    def work() -> None:
        with run_folder(tmp_path / "out", None, lambda: saved[0] if saved else None):
            if not saved:
                saved.append(str(tmp_path / "out" / "checkpoint-2"))
                (tmp_path / "out" / "checkpoint-2").mkdir()
                ctrl_c()

    said = interrupted(work, capsys)
    command = "python -m recipes.x --config 'a b.yaml' --seed 1 --resume_from_checkpoint last"
    assert said == f"\ninterrupted; resume with: {command}\n"


@pytest.mark.usefixtures("_patient")
def test_with_nothing_saved_it_says_so_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "recipes.x", "--seed", "1"])

    def work() -> None:
        with run_folder(tmp_path / "out", None, none):
            ctrl_c()

    said = interrupted(work, capsys)
    assert said == "\ninterrupted; nothing is saved yet, start it again with: python -m recipes.x --seed 1\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_patient")
def test_under_a_launcher_the_first_process_speaks_and_names_no_command_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    assert interrupted(ctrl_c, capsys) == "\ninterrupted; start the same command again\n"
    monkeypatch.setenv("RANK", "1")
    assert interrupted(ctrl_c, capsys) == ""


@pytest.mark.usefixtures("_patient")
def test_an_error_that_follows_the_signal_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            ctrl_c()
        except KeyboardInterrupt:
            raise RuntimeError("a worker is gone") from None

    assert "interrupted; nothing is saved yet" in interrupted(work, capsys)


def test_a_program_that_ends_by_itself_leaves_the_signal_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    before, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    assert interrupt.guarded(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        interrupt.guarded(lambda: 1 / 0)
    assert signal.getsignal(signal.SIGINT) is before
    until(lambda: threading.active_count() == threads)


def test_ctrl_c_after_the_work_does_not_say_that_nothing_is_saved() -> None:
    interrupt.guarded(lambda: None)
    assert interrupt.line() == "interrupted on the way out; the work is done"


def until(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


PATIENCE = 20  # seconds: two are promised, a loaded machine may need more


BUSY = """
import sys, torch
from recipes.common.start import run_main

def main():
    a = torch.ones(4000, 4000, dtype=torch.float64)
    print("busy", flush=True)
    for _ in range(1000):
        torch.linalg.matrix_power(a, 2**40)  # one call into C++, far longer than the time that Ctrl-C has

run_main(main)
"""


def test_a_long_call_into_c_ends_within_two_seconds(tmp_path: Path) -> None:
    """The watching thread needs no step of the main one, which would take minutes."""
    assert interrupt._SECONDS <= 1.5  # of the promised two
    (tmp_path / "busy.py").write_text(BUSY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "busy.py")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    until(lambda: "busy" in process.stdout.readline())  # after what libraries say when they are imported
    time.sleep(0.2)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - start < PATIENCE
    assert process.returncode == 130
    assert "interrupted; nothing is saved yet, start it again with: python " in said
    assert "Traceback" not in said


def pretraining(folder: Path, **options: Any) -> Path:
    """A run of the pretraining recipe that would take hours, as a YAML file."""
    (folder / "text.txt").write_text("\n\n".join(f"a text of some words, number {i}" for i in range(400)))
    settings: dict[str, Any] = {
        "train_files": [str(folder / "text.txt")],
        "validation_fraction": 0,
        "tokenizer": "train",
        "vocab_size": 300,
        "cache_dir": str(folder / "cache"),
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 8,
        "n_positions": 16,
        "block_size": 16,
        "max_steps": 1_000_000,
        "save_steps": 5,
        "save_total_limit": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1000,
        "eval_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def ended_by_ctrl_c(words: list[str], ready: Callable[[], object]) -> str:
    """Start a program, send Ctrl-C to it and its workers, as a terminal does, once it is `ready`; what it says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        until(lambda: ready() or process.poll() is not None, 120)
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - start < PATIENCE
        assert process.returncode == 130
        assert "Traceback" not in said
        until(lambda: not in_group(process.pid))  # no worker is left
    finally:
        if in_group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    # A process that ends in time has its semaphores removed by another one, which says so on a slow machine.
    own = [line for line in said.strip().splitlines() if "interrupted" in line]
    return own[-1] if own else said


def in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def test_ctrl_c_in_a_recipe_names_a_command_that_does_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["-m", "recipes.pretrain", str(pretraining(tmp_path)), "--output_dir", str(out)]
    said = ended_by_ctrl_c(words, lambda: any(out.glob("checkpoint-???/trainer_state.json")))
    command = f"python {' '.join(words[:3])} --output_dir {out} --resume_from_checkpoint last"
    assert said == f"interrupted; resume with: {command}"
    last = max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
    pretrain([*command.split()[3:], "--max_steps", str(last + 7)])
    record = json.loads((out / "record.json").read_text())
    assert record["steps"] == last + 7
    assert record["speed"]["steps_timed"] <= 7 + 5  # not from the start, which lies 100 steps back


def test_ctrl_c_in_a_sweep_ends_its_workers_and_the_same_command_goes_on(tmp_path: Path) -> None:
    sweep = {"recipe": "pretrain", "base": str(pretraining(tmp_path)), "runs": {"a": {}}, "processes": 2}
    sweep |= {"grid": {"learning_rate": [1e-3, 1e-4]}, "output": str(tmp_path / "out"), "results": str(tmp_path / "r")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    words = ["-m", "recipes.sweep", str(tmp_path / "sweep.yaml")]
    both = [f"a_{rate}_seed0_*/checkpoint-*5" for rate in ("0.001", "0.0001")]
    said = ended_by_ctrl_c(words, lambda: all(any((tmp_path / "out").glob(pattern)) for pattern in both))
    assert said == f"interrupted; resume with: python -m recipes.sweep {tmp_path / 'sweep.yaml'}"
