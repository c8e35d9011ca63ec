"""Hostile inputs to the optimizer: hyper-parameters, parameters, gradients and state dicts."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_table import Attempt, Case, each, on, stepped
from torch import Tensor, nn

from hf_sai import SGDSaI, gsnr_table, param_groups, release_gradients
from hf_sai.checkpoints import atomic_folder

NAN, INF = math.nan, math.inf
_NUMBER = r"must be a finite number >= 0, got "

HYPERPARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "lr negative": ({"lr": -1e-3}, rf"^lr {_NUMBER}-0\.001$"),
    "lr NaN": ({"lr": NAN}, rf"^lr {_NUMBER}nan$"),
    "lr infinite": ({"lr": INF}, rf"^lr {_NUMBER}inf$"),
    "lr None": ({"lr": None}, rf"^lr {_NUMBER}None$"),
    "lr a string": ({"lr": "1e-3"}, rf"^lr {_NUMBER}'1e-3'$"),
    "lr a vector": ({"lr": torch.ones(2)}, r"^lr as a tensor must have one element, got shape \(2,\)$"),
    "lr complex": ({"lr": torch.tensor(1j)}, rf"^lr {_NUMBER}tensor\(0\.\+1\.j\)$"),
    "lr a NaN tensor": ({"lr": torch.tensor(NAN)}, rf"^lr {_NUMBER}nan$"),
    "momentum 1": ({"momentum": 1.0}, r"^momentum must be in \[0, 1\), got 1\.0$"),
    "momentum a vector": ({"momentum": torch.ones(2)}, r"^momentum must be in \[0, 1\), got tensor"),
    "momentum True": ({"momentum": True}, r"^momentum must be in \[0, 1\), got True$"),
    "betas for momentum": ({"momentum": (0.9, 0.999)}, r"^momentum must be in \[0, 1\), got \(0\.9, 0\.999\)$"),
    "eps negative": ({"eps": -1e-8}, rf"^eps {_NUMBER}-1e-08$"),
    "eps infinite": ({"eps": INF}, rf"^eps {_NUMBER}inf$"),
    "weight_decay NaN": ({"weight_decay": NAN}, rf"^weight_decay {_NUMBER}nan$"),
    "scaling in capitals": ({"scaling": "RAW"}, r"^scaling must be one of 'adamw', 'raw', 'max', got 'RAW'$"),
    "scaling floor": ({"scaling": "floor"}, r"^scaling must be .*, got 'floor'; 'floor' is now 'adamw'$"),
    "scaling None": ({"scaling": None}, r"^scaling must be one of .*, got None$"),
    "scaling a list": ({"scaling": ["raw"]}, r"^scaling must be one of .*, got \['raw'\]$"),
    "maximize a string": ({"maximize": "no"}, r"^maximize must be True or False, got 'no'$"),
    "stochastic_rounding 1": ({"stochastic_rounding": 1}, r"^stochastic_rounding must be True or False, got 1$"),
    "foreach a string": ({"foreach": "auto"}, r"^foreach must be True, False or None .*, got 'auto'$"),
    "foreach and fused": ({"foreach": True, "fused": True}, r"^foreach and fused cannot both be True; leave one"),
    "fused on a CPU": ({"fused": True}, r"^fused=True is impossible for .*; set it to None$"),
    "momentum_dtype float16": ({"momentum_dtype": "float16"}, r"^momentum_dtype must be None or one of .*'float16'$"),
}


def parameter(**kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, **kwargs))


def integers() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)


TWICE = parameter()
PARAMETERS: dict[str, tuple[Any, type[Exception], str]] = {
    "no parameters": ([], ValueError, "empty parameter list"),
    "a generator that is used up": (iter(()), ValueError, "empty parameter list"),
    "a tensor for a list": (parameter(), TypeError, "iterable of Tensors"),
    "strings": (["weight"], TypeError, "can only optimize Tensors, but one of the params is str"),
    "a module": ([nn.Linear(2, 2)], TypeError, "can only optimize Tensors, but one of the params is .*Linear"),
    "no leaf": ([parameter() * 2], ValueError, "can't optimize a non-leaf Tensor"),
    "complex": ([parameter(dtype=torch.complex64)], ValueError, r"torch\.complex64; train the real view"),
    "integers": ([integers()], ValueError, r"SGDSaI trains real floating-point parameters, .* is torch\.int64"),
    "one in two groups": ([{"params": [TWICE]}, {"params": [TWICE]}], ValueError, "more than one parameter group"),
    "a bad group": ([{"params": [parameter()], "momentum": 2}], ValueError, r"momentum must be in \[0, 1\), got 2\.0"),
}


def sparse_gradient(_: Path) -> Attempt:
    optimizer = stepped()
    layer = nn.Embedding(4, 3, sparse=True)
    optimizer.add_param_group({"params": [("table", layer.weight)]})
    layer(torch.tensor([1])).sum().backward()
    return on(optimizer, lambda o: o.step())


def damaged(damage: Callable[[dict[str, Any]], Any]) -> Attempt:
    """Load the optimizer's own state dict after `damage`, which changes it or returns another."""
    optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["momentum_buffer"] += 1.0  # so that loading half of it would show
    other = damage(saved)
    return on(optimizer, lambda o: o.load_state_dict(saved if other is None else other))


def first(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][0].update(entries)


def group(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(entries)


def of_other(cls: type[torch.optim.Optimizer], *shapes: tuple[int, ...]) -> Callable[[Any], dict[str, Any]]:
    def state_dict(_: Any) -> dict[str, Any]:
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = cls(params, lr=0.1, **({} if cls is torch.optim.AdamW else {"momentum": 0.9}))
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return optimizer.state_dict()

    return state_dict


def with_element(value: float) -> Tensor:
    buffer = torch.zeros(6)
    buffer[3] = value
    return buffer


_DIVERGED = "of a has NaN or infinite elements in the state dict: .* load an earlier checkpoint"
STATE_DICTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "empty": (lambda _: {}, "must have a dict 'state' and a list 'param_groups', got the keys none"),
    "a list": (lambda saved: [saved], r"a state dict of SGDSaI must be a dict, got \[\{"),
    "of a model": (lambda _: {"weight": torch.ones(2)}, "list 'param_groups', got the keys 'weight'"),
    "no groups": (lambda s: s.pop("param_groups") and None, "list 'param_groups', got the keys 'state'"),
    "no state": (lambda s: s.pop("state") and None, "dict 'state' .* got the keys 'param_groups'"),
    "state a list": (lambda s: s.update(state=[1]), "a dict 'state'"),
    "a group without params": (lambda s: s["param_groups"][0].pop("params") and None, "param group 0 .* 'params'"),
    "a group that is none": (lambda s: s.update(param_groups=["x"]), "param group 0 of the state dict .*: 'x'"),
    "two groups for one": (lambda s: s["param_groups"].append({"params": []}), r"have \[2, 0\] .* optimizer \[2\]"),
    "fewer blocks": (of_other(SGDSaI, (6,)), r"have \[1\] parameters, those of the optimizer \[2\]: the state dict"),
    "other shapes": (of_other(SGDSaI, (6,), (6, 2)), r"momentum_buffer of b must have .* \(2, 6\), .* has \(6, 2\)"),
    "of AdamW": (
        of_other(torch.optim.AdamW, (6,), (2, 6)),
        "param group 0 of the state dict has no 'scaling': it is not from SGDSaI",
    ),
    "of SGD": (
        of_other(torch.optim.SGD, (6,), (2, 6)),
        "param group 0 of the state dict has no 'scaling': it is not from SGDSaI",
    ),
    "gsnr missing": (lambda s: s["state"][0].pop("gsnr") and None, "the state of a has no 'gsnr': it is not from"),
    "scale missing": (
        lambda s: s["state"][1].pop("scale").sum() and None,
        "the state of b has no 'scale': it is not from",
    ),
    "calibration_step missing": (
        lambda s: s["state"][0].pop("calibration_step") is None or None,
        "the state of a has no 'calibration_step': it is not from",
    ),
    "scales of other channels": (first(scale=torch.ones(6)), r"scale of a must have the shape \(1,\), .* has \(6,\)"),
    "scales of an older version": (
        first(scale=torch.tensor(1.0)),
        r"scale of a must have the shape \(1,\), .* has \(\)",
    ),
    "an extra block": (lambda s: s["state"].update({9: s["state"][0]}), "state for parameter 9, but none of its"),
    "an entry that is none": (lambda s: s["state"].update({0: 3}), "the state of a must be a dict, .* has 3"),
    "a buffer of another shape": (first(momentum_buffer=torch.zeros(7)), r"\(6,\), but the state dict has \(7,\)"),
    "a buffer that is a list": (first(momentum_buffer=[0.0] * 6), r"momentum_buffer of a must be a real tensor, .*\[0"),
    "a complex buffer": (first(momentum_buffer=torch.zeros(6) * 1j), "momentum_buffer of a must be a real tensor"),
    "a buffer of int8": (first(momentum_buffer=torch.zeros(6, dtype=torch.int8)), "must be .*, .* has torch.int8"),
    "a buffer with NaN": (first(momentum_buffer=with_element(NAN)), f"momentum_buffer {_DIVERGED}"),
    "a buffer with infinity": (first(momentum_buffer=with_element(-INF)), f"momentum_buffer {_DIVERGED}"),
    "gsnr NaN": (first(gsnr=torch.tensor(NAN)), f"gsnr {_DIVERGED}"),
    "gsnr negative": (first(gsnr=torch.tensor(-3.0)), r"gsnr of a must not be negative, but the state dict has -3\.0"),
    "gsnr a vector": (first(gsnr=torch.ones(2)), r"gsnr of a must have the shape \(\), but the state dict has \(2,\)"),
    "gsnr complex": (first(gsnr=torch.tensor(1j)), "gsnr of a must be a real tensor"),
    "scale infinite": (first(scale=torch.tensor([INF])), f"scale {_DIVERGED}"),
    "a count below zero": (
        first(calibration_step=torch.tensor(-1)),
        "calibration_step of a must not be negative, .* -1",
    ),
    "momentum 2": (group(momentum=2), r"momentum must be in \[0, 1\), got 2\.0"),
    "lr a word": (group(lr="fast"), f"lr {_NUMBER}'fast'"),
    "scaling unknown": (group(scaling="mean"), "scaling must be one of 'adamw', 'raw', 'max', got 'mean'"),
    "scaling of an older version": (group(scaling="floor"), "'floor' is now 'adamw'"),
    "names in another order": (group(param_names=["b", "a"]), "has 'b' where the optimizer has 'a': build .* order"),
    "a name too few": (group(param_names=["a"]), r"param_names .* must be a list of 2 names, got \['a'\]"),
}


def existing_folder(folder: Path) -> Attempt:
    (folder / "step-1").mkdir()
    (folder / "step-1" / "weights").write_text("whole")

    def save() -> None:
        with atomic_folder(folder / "step-1"):
            raise AssertionError("never entered")

    return Attempt(save)


CASES: list[Case] = [
    *each(HYPERPARAMETERS, lambda options: Attempt(lambda: SGDSaI([parameter()], **options)), ValueError),
    *(
        Case(f"parameters: {name}", lambda _, given=given: Attempt(lambda: SGDSaI(given)), error, says)
        for name, (given, error, says) in PARAMETERS.items()
    ),
    Case(
        "add_param_group: bad lr",
        lambda _: on(stepped(), lambda o: o.add_param_group({"params": [("c", parameter())], "lr": NAN})),
        ValueError,
        f"lr {_NUMBER}nan",
    ),
    Case(
        "add_param_group: a block that is there",
        lambda _: on(stepped(), lambda o: o.add_param_group({"params": [("a", o.param_groups[0]["params"][0])]})),
        ValueError,
        "more than one parameter group",
    ),
    Case("a sparse gradient", sparse_gradient, ValueError, "SGDSaI needs dense gradients, but table .* sparse=False"),
    *(
        Case(f"state dict: {name}", lambda _, damage=damage: damaged(damage), ValueError, says)
        for name, (damage, says) in STATE_DICTS.items()
    ),
    *(
        Case(f"param_groups: {name}", lambda _, given=given: Attempt(lambda: param_groups(**given)), ValueError, says)
        for name, given, says in (
            ("model None", {"model": None}, "model must be a torch.nn.Module, got NoneType"),
            (
                "model without what trains",
                {"model": nn.Linear(2, 2).requires_grad_(False)},
                "model has no parameter with requires_grad; unfreeze",
            ),
            (
                "weight_decay negative",
                {"model": nn.Linear(2, 2), "weight_decay": -0.1},
                r"weight_decay must be a finite number >= 0, got -0\.1",
            ),
            (
                "decay_parameters a text",
                {"model": nn.Linear(2, 2), "decay_parameters": "weight"},
                r"decay_parameters must be a collection of names, got the string 'weight'; write \['weight'\]",
            ),
            (
                "token_modules of no module",
                {"model": nn.Linear(2, 2), "token_modules": ["head"]},
                "token_modules must name modules .* got 'head', which the model lacks",
            ),
        )
    ),
    Case(
        "release_gradients: optimizer AdamW",
        lambda _: Attempt(lambda: release_gradients(torch.optim.AdamW([parameter()]), nn.Linear(2, 2))),
        ValueError,
        "optimizer must be an SGDSaI, got AdamW; only SGDSaI releases gradients",
    ),
    Case(
        "release_gradients: model of other parameters",
        lambda _: Attempt(lambda: release_gradients(SGDSaI([parameter()]), nn.Linear(2, 2))),
        ValueError,
        "release_gradients: the model does not contain ",
    ),
    Case(
        "gsnr_table: model None",
        lambda _: Attempt(lambda: gsnr_table(SGDSaI([parameter()]), None)),
        ValueError,
        "model must be a torch.nn.Module, got NoneType",
    ),
    Case(
        "gsnr_table: optimizer AdamW",
        lambda _: Attempt(lambda: gsnr_table(torch.optim.AdamW([parameter()]), nn.Linear(2, 2))),
        TypeError,
        "optimizer must be an SGDSaI, got AdamW; only SGDSaI measures g-SNR",
    ),
    Case("a checkpoint over another", existing_folder, FileExistsError, "step-1 already exists; give each checkpoint"),
]
