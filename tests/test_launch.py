"""`python -m hf_sai.launch`: an unchanged script sees what the interpreter would show it, and a registered name."""

import json
import multiprocessing.spawn
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Says what a script can see of how it was started, then uses what needs a real __main__ module.
OBSERVER = """
import atexit, inspect, json, multiprocessing, pickle, sys
import neighbour

class Local:
    pass

def double(x):
    # Nothing is imported for it: without the launcher there is no transformers here.
    arguments = sys.modules.get("transformers.training_args")
    registered = arguments is not None and "sgd_sai" in arguments.OptimizerNames._value2member_map_
    with open("child.json", "w") as file:
        json.dump(registered, file)
    return 2 * x

def report(stage):
    main = sys.modules["__main__"]
    print(json.dumps({
        "stage": stage, "argv": sys.argv, "path0": sys.path[0], "name": __name__, "file": __file__,
        "spec": __spec__, "loader": __loader__.name, "package": __package__, "doc": __doc__, "main_is_this": main.Local is Local,
        "pickled": type(pickle.loads(pickle.dumps(Local()))) is Local, "neighbour": neighbour.VALUE,
        "source": inspect.getsource(double).splitlines()[0],
    }), flush=True)

if __name__ == "__main__":
    report("running")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps(pool.map(double, [21])), flush=True)
    atexit.register(report, "exiting")
    sys.exit(7)
"""  # noqa: E501

TRAINING = """
import json, sys
from transformers import HfArgumentParser, TrainingArguments, Trainer
from torch import nn

if __name__ == "__main__":
    args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    trainer = Trainer(nn.Linear(2, 2), args)
    print(json.dumps([args.optim, type(trainer.create_optimizer()).__module__, sys.argv[1:], __name__]), flush=True)
"""

# Starts another program as Axolotl does.
STARTING = (
    TRAINING
    + """
    import os
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    os.execvp("accelerate", ["accelerate", "launch", "--cpu", *options, "-m", "worker", "a", "-m b"])
"""
)

# Stands for a training script that other programs start: says which optimizer it got, and where it was started.
WORKER = """
import json, os, sys
from torch import nn
from transformers import Trainer, TrainingArguments

def work(name):
    args = TrainingArguments("out", optim="sgd_sai", optim_args={"momentum": 0.5}, use_cpu=True, report_to="none")
    optimizer = Trainer(nn.Linear(2, 2), args).create_optimizer()
    told = [type(optimizer).__module__, optimizer.param_groups[0]["momentum"], sys.argv[1:], __name__]
    with open(f"told-{name}.json", "w") as file:
        json.dump(told, file)

if __name__ == "__main__":
    work("torchrun" if "RANK" in os.environ else "python")
"""

FORKSERVER = """
import multiprocessing, worker
if __name__ == "__main__":
    child = multiprocessing.get_context("forkserver").Process(target=worker.work, args=("child",))
    child.start()
    child.join()
    assert child.exitcode == 0
"""

# As on a cluster. LLaMA-Factory uses torchrun for several GPUs.
JOB = """#!/bin/sh
python -c "import worker; worker.work('code')" "$@" || exit
python worker.py "$@" && torchrun --standalone --nproc_per_node 1 worker.py "$@" && exit 5
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # `-m hf_sai.launch` from a folder that is not the repository's: the package must be importable from there. The
    # programs of this environment are on PATH, as they are where it is activated.
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "XDG_CACHE_HOME": str(cwd / "cache"),
    }
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=800, cwd=cwd, env=env)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to start in, with a folder of scripts beneath."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").write_text("VALUE = 'found'\n")
    (tmp_path / "scripts" / "observer.py").write_text(OBSERVER)
    (tmp_path / "scripts" / "training.py").write_text(TRAINING)
    return tmp_path


def test_a_script_sees_what_the_interpreter_would_show_it(folder: Path) -> None:
    """The child that it spawns is registered."""
    argv = ["scripts/observer.py", "--optim", "sgd_sai", "-m", "a b"]
    plain = run(sys.executable, *argv, cwd=folder)
    assert plain.stdout.count("\n") == 3
    assert json.loads((folder / "child.json").read_text()) is False
    launched = run(sys.executable, "-m", "hf_sai.launch", *argv, cwd=folder)
    assert launched.stdout == plain.stdout, launched.stderr
    assert launched.returncode == plain.returncode == 7
    assert json.loads((folder / "child.json").read_text()) is True


def test_a_script_behind_a_link_finds_its_neighbours(folder: Path) -> None:
    (folder / "link.py").symlink_to(folder / "scripts" / "observer.py")
    plain = run(sys.executable, "link.py", cwd=folder)
    light = "import sys; from hf_sai.launch import run_script; sys.argv[:] = ['link.py']; run_script('link.py')"
    assert run(sys.executable, "-c", light, cwd=folder).stdout == plain.stdout


def test_an_exception_ends_the_launch_with_the_scripts_own_line(folder: Path) -> None:
    (folder / "fails.py").write_text("# -*- coding: latin-1 -*-\nname = '\xe9'\nraise LookupError(name)\n", "latin-1")
    light = "from hf_sai.launch import run_script; run_script('fails.py')"
    done = run(sys.executable, "-c", light, cwd=folder)
    assert done.returncode == 1
    assert 'fails.py", line 3, in <module>\n    raise LookupError(name)' in done.stderr
    assert "LookupError: \xe9" in done.stderr


def test_a_script_under_accelerate_and_the_accelerate_that_it_starts_are_registered(folder: Path) -> None:
    (folder / "worker.py").write_text(WORKER)
    (folder / "start.py").write_text(STARTING)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_sai.launch"]
    argv = ["--optim", "sgd_sai", "--output_dir", "out", "--use_cpu", "--report_to", "none"]
    done = run(*launcher, *options, "start.py", *argv, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = [
        line for line in done.stdout.splitlines() if line.startswith('["sgd_sai"')
    ]  # deepspeed may log beside it
    assert json.loads(told) == ["sgd_sai", "hf_sai.optimizer", argv, "__main__"]
    assert json.loads((folder / "told-python.json").read_text()) == ["hf_sai.optimizer", 0.5, ["a", "-m b"], "__main__"]


def test_a_command_that_is_not_python_reaches_its_children(folder: Path) -> None:
    (folder / "worker.py").write_text(WORKER)
    (folder / "job.sh").write_text(JOB)
    (folder / "job.sh").chmod(0o755)
    done = run(sys.executable, "-m", "hf_sai.cli", "launch", "job.sh", "a b", "-m c", cwd=folder)
    assert done.returncode == 5, done.stderr[-3000:]
    for name in ("code", "python", "torchrun"):
        told = json.loads((folder / f"told-{name}.json").read_text())
        assert told == ["hf_sai.optimizer", 0.5, ["a b", "-m c"], "worker" if name == "code" else "__main__"]


@pytest.mark.slow
def test_the_child_of_a_forkserver_is_registered(folder: Path) -> None:
    (folder / "worker.py").write_text(WORKER)
    (folder / "start.py").write_text(FORKSERVER)
    done = run(sys.executable, "-m", "hf_sai.launch", "start.py", "a", "-m b", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "told-child.json").read_text()) == ["hf_sai.optimizer", 0.5, ["a", "-m b"], "worker"]


PASSED_ON = [
    ("s.py -m x", "-m hf_sai.launch s.py -m x"),
    ("-u s.py a", "-u -m hf_sai.launch s.py a"),
    ("-E -s -m pkg.mod --flag", "-E -s -m hf_sai.launch -m pkg.mod --flag"),
    ("-um mod -c x", "-u -m hf_sai.launch -m mod -c x"),
    ("-mmod x", "-m hf_sai.launch -m mod x"),
    ("-c code -m", "-m hf_sai.launch -c code -m"),
    ("-W ignore -X dev s.py", "-W ignore -X dev -m hf_sai.launch s.py"),
    ("-Wignore -Xdev -c code", "-Wignore -Xdev -m hf_sai.launch -c code"),
    ("- a", "-m hf_sai.launch - a"),
    ("-V", "-V"),
    ("", ""),
    # multiprocessing's own book-keeping
    (
        "-s -c from_multiprocessing.resource_tracker_import_main",
        "-s -c from_multiprocessing.resource_tracker_import_main",
    ),
]


@pytest.mark.parametrize(("given", "wanted"), PASSED_ON)
def test_the_script_puts_the_launcher_behind_the_interpreters_options(given: str, wanted: str, tmp_path: Path) -> None:
    from hf_sai.children import _SCRIPT

    script = tmp_path / "python"
    script.write_text(_SCRIPT.format(python="printf '<%s>'", scripts="'/the scripts'"))
    told = subprocess.run(["sh", str(script), *given.split(), "a  b", ""], capture_output=True, text=True, check=True)
    assert told.stdout == "".join(f"<{word}>" for word in (*wanted.split(), "a  b", "")) or not given.strip("-V")
    script.rename(tmp_path / "accelerate")
    told = subprocess.run(["sh", str(tmp_path / "accelerate"), "launch"], capture_output=True, text=True, check=True)
    assert told.stdout == "<-m><hf_sai.launch></the scripts/accelerate><launch>"


@pytest.mark.usefixtures("registered")
def test_a_module_instead_of_a_script(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_sai.launch import main

    argv = ["--optim", "sgd_sai", "--output_dir", "out", "--use_cpu", "--report_to", "none"]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["as before"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    executable = sys.executable
    main(["-m", "scripts.training", *argv])
    assert sys.executable == executable, "what children inherit is put back"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == ["sgd_sai", "hf_sai.optimizer", argv, "__main__"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: python -m hf_sai.launch SCRIPT"),
        (["-m"], "usage: python -m hf_sai.launch SCRIPT"),
        (["--optim", "sgd_sai"], "usage: python -m hf_sai.launch SCRIPT"),
        (["missing.py", "--optim", "sgd_sai"], "cannot open script 'missing.py': there is no such file"),
    ],
)
def test_nothing_to_run_is_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_sai.launch import main

    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_sai.launch import main

    main(["--help"])
    assert "accelerate launch -m hf_sai.launch sft.py --optim sgd_sai" in capsys.readouterr().out


def test_the_script_is_written_once_also_where_there_is_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_sai.children import registered_children

    def seen() -> tuple[str, ...]:
        found = [sys.executable, os.environ["PATH"], os.environ.get("PYTHON_EXEC", ""), shutil.which("python") or ""]
        return (*found, os.fsdecode(multiprocessing.spawn.get_executable()))

    real = sys.executable
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # where no folder can be made
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(real), os.environ["PATH"]]))
    monkeypatch.delenv("PYTHON_EXEC", raising=False)
    before = seen()
    with registered_children():
        inside = seen()
        script, _, for_torchrun, on_path, spawned = inside
        assert os.access(script, os.X_OK)
        assert script == for_torchrun == spawned
        assert os.path.realpath(on_path) == os.path.realpath(script)
        with registered_children():
            assert seen() == inside
        assert seen() == inside
        sys.executable = real  # as in a child
        with registered_children():
            assert seen() == inside
        assert len(list(tmp_path.iterdir())) == 2
    assert seen() == before


def test_the_command_is_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_sai.cli import main as command
    from hf_sai.launch import main

    main(["--help"])
    wanted = capsys.readouterr().out
    assert command(["launch", "--help"]) == 0
    assert capsys.readouterr().out == wanted
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "optim='sgd_sai' is valid" in capsys.readouterr().out
