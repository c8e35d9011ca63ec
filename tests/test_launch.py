"""`python -m hf_sai.launch`: an unchanged script sees what the interpreter would show it, and a registered name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Says what a script can see of how it was started, then uses what needs a real __main__ module.
OBSERVER = """
import atexit, inspect, json, multiprocessing, pickle, sys
import neighbour

class Local:
    pass

def double(x):
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
    print(json.dumps([args.optim, type(trainer.create_optimizer()).__module__, sys.argv[1:], __name__]))
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # `-m hf_sai.launch` from a folder that is not the repository's: the package must be importable from there.
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
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
    argv = ["scripts/observer.py", "--optim", "sgd_sai", "-m", "a b"]
    plain = run(sys.executable, *argv, cwd=folder)
    launched = run(sys.executable, "-m", "hf_sai.launch", *argv, cwd=folder)
    assert plain.stdout.count("\n") == 3
    assert launched.stdout == plain.stdout, launched.stderr
    assert launched.returncode == plain.returncode == 7


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


def test_stock_arguments_and_trainer_take_the_name_under_accelerate(folder: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_sai.launch"]
    argv = ["--optim", "sgd_sai", "--output_dir", "out", "--use_cpu", "--report_to", "none"]
    done = run(*launcher, *options, "scripts/training.py", *argv, cwd=folder)
    assert json.loads(done.stdout.splitlines()[-1]) == ["sgd_sai", "hf_sai.optimizer", argv, "__main__"], done.stderr


@pytest.mark.usefixtures("registered")
def test_a_module_instead_of_a_script(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_sai.launch import main

    argv = ["--optim", "sgd_sai", "--output_dir", "out", "--use_cpu", "--report_to", "none"]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["as before"])
    main(["-m", "scripts.training", *argv])
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
