"""The data of the shipped configurations: `$HF_SAI_DATA/NAME`, and where the public has each of them from.

`HF_SAI_DATA` names the folder that holds them, by default `data` in the clone. A first look needs none of them:
the text `sample` (`sample_text.py`), scikit-learn's digits and the demo's sentences are made on the spot.
"""

import glob
import os
from pathlib import Path

VARIABLE = "HF_SAI_DATA"
# By the folder's name: what it is and where it is.
SOURCES = {
    "tinyshakespeare": "input.txt is data/tinyshakespeare/input.txt of karpathy/char-rnn on GitHub (1.1 MB); "
    "`sample` is a text of the same size that needs no download",
    "e2e": "the E2E set is tuetschek/e2e_nlg on the hub, and trainset.csv, devset.csv and testset_w_refs.csv of "
    "tuetschek/e2e-dataset on GitHub; `python -m recipes.e2e.demo` needs neither",
    "pretrain": "188 MB of English prose collected from public repositories, not published as a whole; take any "
    "English text, or Skylion007/openwebtext from the hub with --dataset. `sample` needs no download",
    "cifar_like": "5,000 images of CIFAR-10 for training and 1,000 to validate on; uoft-cs/cifar10 on the hub has all; "
    "`digits` needs no download",
}


def data_folder() -> Path:
    """`HF_SAI_DATA`, by default `data` in the clone."""
    return Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "data").expanduser()


def expand(value: str) -> tuple[str, str | None]:
    """A value of a configuration with `$HF_SAI_DATA` replaced; and where nothing is there, what to do."""
    for prefix in (f"${VARIABLE}/", f"${{{VARIABLE}}}/"):
        if value.startswith(prefix):
            rest = value.removeprefix(prefix)
            path = str(data_folder() / rest)
            if glob.glob(path) if glob.has_magic(rest) else os.path.exists(path):
                return path, None
            source = SOURCES.get(rest.partition("/")[0])
            where = "" if os.environ.get(VARIABLE) else f" ({VARIABLE} is not set)"
            return path, (
                f"there is no {path!r}{where}; set {VARIABLE} to the folder that holds {rest}, or give other data"
                + (f". Where it is: {source}" if source else "")
            )
    return value, None
