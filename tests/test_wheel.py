"""The wheel, installed into an empty environment that sees torch, what torch needs, and nothing else."""

import re
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parent.parent
STEP = """
import sys, torch, hf_sai
layer = torch.nn.Linear(4, 2)
optimizer = hf_sai.SGDSaI(hf_sai.param_groups(layer), lr=0.1)
layer(torch.ones(3, 4)).square().mean().backward()
optimizer.step()
print(len(optimizer.state), hf_sai.__file__, "transformers" in sys.modules)
"""


def needed(package: str) -> set[str]:
    """A distribution and all that it requires without extras."""
    found, left = set(), [package]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for requirement in metadata.requires(name) or ():
            required = re.match(r"[\w.-]+", requirement)
            assert required is not None
            try:
                metadata.version(required[0])
            except metadata.PackageNotFoundError:  # of another platform or Python
                continue
            if "extra ==" not in requirement:
                left.append(required[0])
    return found


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the environment's programs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / Path(sys.executable).parent.name / "python"
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)

    libraries = folder / "libraries"
    libraries.mkdir()
    for name in needed("torch"):
        for path in metadata.distribution(name).files or ():
            top = path.parts[0]
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (libraries / top).exists():
                (libraries / top).symlink_to(source)
    scheme = sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv")})
    (Path(scheme) / "torch.pth").write_text(f"{libraries}\n")
    return python.parent


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_optimizer_needs_torch_alone(scripts: Path, tmp_path: Path) -> None:
    done = run([str(scripts / "python"), "-W", "ignore", "-c", STEP], tmp_path)
    assert done.returncode == 0, done.stderr
    states, file, transformers = done.stdout.split()
    assert (states, transformers) == ("2", "False")
    assert Path(file).is_relative_to(scripts.parent)


def test_the_command_explains_itself_and_what_it_lacks(scripts: Path, tmp_path: Path) -> None:
    done = run([str(scripts / "hf-sai"), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("score", "bench", "gsnr", "launch"):
        assert command in done.stdout
    (tmp_path / "texts.txt").write_text("a\n")
    (tmp_path / "references.csv").write_text("mr,ref\nname[A],a\n")
    for words, package in (
        (["score", "texts.txt", "--references", "references.csv"], "pycocoevalcap"),
        (["gsnr", "--model", "gpt2", "--data", "texts.txt"], "transformers"),
    ):
        done = run([str(scripts / "hf-sai"), *words], tmp_path)
        assert done.returncode != 0
        # Above it is torch's own warning that there is no numpy.
        assert re.fullmatch(
            rf"hf-sai {words[0]}: error: needs the package {package}: pip install {package}",
            done.stderr.strip().splitlines()[-1],
        )
        assert "Traceback" not in done.stderr
