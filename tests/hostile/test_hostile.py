"""Each hostile input gives the error it must, and leaves files and state as they were."""

import inspect
import re
import sys
from pathlib import Path

import cases_arguments
import cases_optimizer
import cases_recipes
import cases_tables
import pytest
from hostile_table import Case, listing

sys.path.append(str(Path(__file__).parents[1]))
from test_signatures import public_callables

CASES = [*cases_optimizer.CASES, *cases_arguments.CASES, *cases_tables.CASES, *cases_recipes.CASES]

# transformers' warnings about a model that is none of its own
pytestmark = pytest.mark.filterwarnings("ignore:.*label_names.*:UserWarning")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_hostile_input(case: Case, tmp_path: Path) -> None:
    attempt = case.prepare(tmp_path)
    before = attempt.state(), listing(tmp_path)
    with pytest.raises(case.error) as caught:
        attempt.call()
    assert type(caught.value) is case.error
    assert re.search(case.says, str(caught.value), re.DOTALL), str(caught.value)
    assert len(str(caught.value)) < 2000
    after = attempt.state(), listing(tmp_path)
    assert after == before


# Arguments without a hostile case, and why: any value does, or torch or transformers refuses it with words of its own.
ANY_VALUE = {
    "GSNRCallback.on_train_begin", "GSNRCallback.on_pre_optimizer_step", "GSNRCallback.on_step_end",
    "GSNRCallback.on_log", "GSNRCallback.on_train_end",  # called by a Trainer
    "SGDSaI.step(closure)", "SGDSaI.zero_grad(set_to_none)", "release_gradients(track_norm)",
    "SaITrainer(model)", "SaITrainer(args)", "SaITrainer.get_optimizer_cls_and_kwargs(args)",
    "SaITrainer.get_optimizer_cls_and_kwargs(model)", "SaITrainingArguments.set_optimizer(name)",
}  # fmt: skip
# What a case of these is called by.
CALLED = {
    "SGDSaI(params)": "parameters",
    "SGDSaI.add_param_group(param_group)": "add_param_group",
    "SGDSaI.load_state_dict(state_dict)": "state dict",
}


def test_every_public_argument_has_a_hostile_case() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    missing = []
    for function, public in public_callables().items():
        if function in ANY_VALUE:
            continue
        for p in inspect.signature(public).parameters.values():
            argument = f"{function}({p.name})"
            if p.name == "self" or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or argument in ANY_VALUE:
                continue
            start = CALLED.get(argument, p.name if function == "SGDSaI" else f"{function}: {p.name}")
            if not any(name.startswith(start) for name in names):
                missing.append(argument)
    assert missing == []
