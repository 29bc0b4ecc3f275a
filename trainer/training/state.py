"""What changes while a run runs, taken apart into JSON and tensors, and put together again.

A stage keeps everything that changes in one dataclass. Each of its fields is looked at by its kind, so that a new
field cannot be forgotten in checkpoints: what nobody knows how to save is refused at the first step.
"""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.training.optimizer import Optimizer
from trainer.training.progress import Progress

TENSOR, NUMBER = "$tensor", "$number"
Plain = bool | int | float | str | None
Tensors = dict[str, Tensor]


class Mark:
    """A state at one moment: small things copied, large ones by name.

    Weights and optimizers are not copied. They may not change between a mark and a save that uses it.
    """

    def __init__(self, state: Progress) -> None:
        self.small: Tensors = {}
        self.large: dict[str, nn.Module | Optimizer] = {}
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)} | {"random": _random_state()}
        # Text, because lists go on changing; the C encoder walks them faster than we could copy them.
        self.json = {name: _encoded(self._take(value, name), name) for name, value in fields.items()}
        self.step, self.part = state.step, state.part

    def plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {name: json.loads(text, parse_constant=lambda x: {NUMBER: x}) for name, text in self.json.items()}

    def tensors(self) -> dict[str, Tensors]:
        """Files and what they hold: one per model, one per optimizer, one for the rest."""
        found = {name: x.tensors() if isinstance(x, Optimizer) else _weights(x) for name, x in self.large.items()}
        return found | {"small": self.small}

    def _take(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Generator):
            value = value.get_state()
        if isinstance(value, Tensor):
            self.small[name] = value
            return {TENSOR: name}
        if isinstance(value, nn.Module | Optimizer):
            self.large[name] = value
            return None if isinstance(value, nn.Module) else value.counters()
        if hasattr(value, "state_dict"):
            return value.state_dict()
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict) and not all(isinstance(v, Plain) for v in value.values()):
            return {k: self._take(v, f"{name}.{k}") for k, v in value.items()}
        return value


class Restored:
    """A saved state on its way back.

    Args:
        plain: Of ``Mark.plain``.
        tensors: Gives the tensors of a file.
        device: Where tensors of the state go; those of random generators stay on the host.
    """

    def __init__(self, plain: dict[str, Any], tensors: typing.Callable[[str], Tensors], device: torch.device) -> None:
        self.plain, self.tensors, self.device = plain, tensors, device
        self.small = tensors("small")

    def into(self, state: Progress) -> None:
        """Makes ``state`` what it was, and the random generators of the process too.

        Raises:
            ValueError: If the state has other parts than the saved one, or weights of other shapes.
        """
        hints = typing.get_type_hints(type(state))
        names = {f.name for f in dataclasses.fields(state)}
        if differ := sorted((names | {"random"}) ^ set(self.plain)):
            raise ValueError(f"checkpoint: got the state of another version, {differ} differ")
        for name in names:
            setattr(state, name, self._put(getattr(state, name), self.plain[name], name, hints[name]))
        _set_random_state(self._put(None, self.plain["random"], "random", dict))

    def _put(self, old: Any, plain: Any, name: str, hint: Any) -> Any:
        if isinstance(old, torch.Generator):
            old.set_state(self.small[name])
        elif isinstance(old, nn.Module):
            _load_weights(old, self.tensors(name), name)
        elif isinstance(old, Optimizer):
            old.restore(plain, self.tensors(name))
        elif hasattr(old, "load_state_dict"):
            old.load_state_dict(self._plain(plain, name))
        elif isinstance(old, dict) and any(isinstance(v, nn.Module | Optimizer) for v in old.values()):
            return {k: self._put(v, plain[k], f"{name}.{k}", object) for k, v in old.items()}
        elif plain is not None and (kind := _dataclass_of(hint)) is not None:
            hints = typing.get_type_hints(kind)
            return kind(**{k: self._put(None, v, f"{name}.{k}", hints[k]) for k, v in plain.items()})
        else:
            return self._plain(plain, name, hint)
        return old

    def _plain(self, plain: Any, name: str, hint: Any = None) -> Any:
        if isinstance(plain, dict):
            if TENSOR in plain:
                found = self.small[plain[TENSOR]]
                return found if name.startswith("random") else found.to(self.device)
            if NUMBER in plain:
                return float(plain[NUMBER])
            return {k: self._plain(v, name) for k, v in plain.items()}
        if isinstance(plain, list):
            found = [self._plain(v, name) for v in plain]
            return tuple(found) if typing.get_origin(hint) is tuple else found
        return plain


def _encoded(value: Any, name: str) -> str:
    def refused(inside: Any) -> Any:
        raise TypeError(f"{name}: a {type(inside).__name__} has no state_dict and cannot be saved")

    return json.dumps(value, default=refused)


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in a hint such as ``Experience | None``."""
    kinds = [k for k in (hint, *typing.get_args(hint)) if isinstance(k, type) and dataclasses.is_dataclass(k)]
    return kinds[0] if kinds else None


def _weights(model: nn.Module) -> Tensors:
    """Trainable parameters, each once, and the buffers that belong to a saved model."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trainable | {name: x for name, x in model.state_dict().items() if name not in parameters}


@torch.no_grad()
def _load_weights(model: nn.Module, saved: Tensors, name: str) -> None:
    mine = _weights(model)
    if {k: x.shape for k, x in mine.items()} != {k: x.shape for k, x in saved.items()}:
        differ = sorted(k for k in mine.keys() | saved.keys() if k not in mine or k not in saved) or "their shapes"
        raise ValueError(f"checkpoint: {name} is not the model that was saved: {differ} differ")
    for key, x in mine.items():
        x.copy_(saved[key])


def _random_state() -> dict[str, Any]:
    """Of the generators that anybody may use without asking: those of the process."""
    version, words, gauss = random.getstate()
    kind, keys, at, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": _words(words), "gauss": gauss},
        "numpy": {"kind": kind, "words": _words(keys), "rest": [int(at), int(has_gauss), float(cached)]},
    } | {f"cuda{i}": x for i, x in enumerate(cuda)}


def _words(words: Any) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.int64))


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda0" in state:
        torch.cuda.set_rng_state_all([x for name, x in state.items() if name.startswith("cuda")])
    own, other = state["python"], state["numpy"]
    random.setstate((own["version"], tuple(own["words"].tolist()), own["gauss"]))
    np.random.set_state((other["kind"], other["words"].numpy().astype(np.uint32), *other["rest"]))
