"""A method of one instance is replaced and put back, whatever else is put on it, and copies go without."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch

from proxytune.errors import InputError
from proxytune.generation.method_hooks import Attachable, MethodHook, hooks_on, target_of


class Model:
    def __init__(self) -> None:
        self.weight = 1

    def generate(self) -> int:
        return self.step(1)

    def step(self, x: int, *, twice: bool = False) -> int:
        """Read the weight of the instance that is called."""
        return self.weight * x * (2 if twice else 1)


class Plus:
    """A replacement that adds a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        return original(*args, **kwargs) + self.number


class Attached(Attachable):
    def attach(self, model: Any) -> Self:
        self._refuse_attached()
        self._hooks = (MethodHook(model, "step", Plus(10)), MethodHook(model, "step", Plus(100)))
        return self


def test_the_instance_alone_is_hooked_and_put_back() -> None:
    model, other = Model(), Model()
    before = dict(vars(model))
    hook = MethodHook(model, "step", Plus(10))
    assert hook.is_on_top
    assert (hook.model, hook.name, hook.original) == (model, "step", other.step.__func__.__get__(model))
    assert model.step(3) == 13
    assert model.step(3, twice=True) == 16
    assert other.step(3) == 3
    hook.take()
    assert not hook.is_on_top
    assert vars(model) == before
    hook.take()  # without effect
    assert vars(model) == before
    assert model.step(3) == 3


def test_the_signature_is_the_method_s() -> None:
    model = Model()
    want = inspect.signature(model.step)
    for number in (10, 100):
        MethodHook(model, "step", Plus(number))
        assert inspect.signature(model.step) == want


def test_hooks_nest_and_the_last_one_is_called_first() -> None:
    model = Model()
    calls: list[str] = []

    def noted(name: str) -> Callable[..., int]:
        def replacement(original: Callable[..., int], x: int) -> int:
            calls.append(name)
            return original(x)

        return replacement

    inner, outer = MethodHook(model, "step", noted("inner")), MethodHook(model, "step", noted("outer"))
    assert model.step(3) == 3
    assert calls == ["outer", "inner"]
    assert list(hooks_on(model, "step")) == [outer, inner]
    assert (inner.is_on_top, outer.is_on_top) == (False, True)
    assert list(hooks_on(Model(), "step")) == []
    outer.take()
    assert list(hooks_on(model, "step")) == [inner]
    assert inner.is_on_top
    inner.take()
    assert "step" not in vars(model)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("own", [False, True])
def test_hooks_can_be_taken_in_any_order(own: bool, order: tuple[int, ...]) -> None:
    model = Model()
    if own:
        model.step = lambda x: -x  # type: ignore[method-assign, assignment, misc]
    first = vars(model).get("step")
    hooks = [MethodHook(model, "step", Plus(10**n)) for n in range(3)]
    left = 111
    for n in order:
        hooks[n].take()
        left -= 10**n
        assert model.step(3) == (-3 if own else 3) + left
        assert [h for h in hooks_on(model, "step") if h in hooks] == [h for h in reversed(hooks) if not h._taken]
    assert vars(model).get("step") is first


def test_what_somebody_put_on_top_stays_and_the_hook_has_no_part_in_it() -> None:
    model = Model()
    hook = MethodHook(model, "step", Plus(10))
    inner = model.step
    model.step = lambda x: inner(x) * 7  # type: ignore[method-assign, assignment, misc]
    mine = model.step
    assert not hook.is_on_top
    assert list(hooks_on(model, "step")) == [], "what is below it cannot be known"
    assert model.step(3) == 13 * 7
    hook.take()
    assert model.step is mine
    assert model.step(3) == 3 * 7


def test_copies_go_without() -> None:
    model = Model()
    MethodHook(model, "step", Plus(10))
    MethodHook(model, "step", Plus(100))
    twin = copy.deepcopy(model)
    twin.weight = 5
    assert model.step(3) == 113
    assert twin.step(3) == 15, "its own method, on its own weight"
    assert list(hooks_on(twin, "step")) == []
    hook = MethodHook(twin, "step", Plus(1))
    assert twin.step(3) == 16
    hook.take()
    assert twin.step(3) == 15


def test_a_pickled_model_keeps_its_hooks() -> None:
    model = Model()
    MethodHook(model, "step", Plus(10))
    MethodHook(model, "step", Plus(100))
    twin = pickle.loads(pickle.dumps(model))
    twin.weight = 5
    assert twin.step(3) == 125
    assert model.step(3) == 113
    for hook in list(hooks_on(twin, "step")):
        assert hook.model is twin
        hook.take()
    assert twin.step(3) == 15
    assert model.step(3) == 113


def test_an_error_inside_leaves_the_hook() -> None:
    def broken(original: Any, x: int) -> int:
        raise RuntimeError("broken")

    model = Model()
    hook = MethodHook(model, "step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.step(1)
    assert hook.is_on_top
    with pytest.raises(AttributeError, match="no_such_method"):
        MethodHook(model, "no_such_method", broken)
    assert "no_such_method" not in vars(model)


def test_a_module_can_be_hooked() -> None:
    module = torch.nn.Linear(2, 2)
    before = set(vars(module))
    hook = MethodHook(module, "extra_repr", lambda original: f"hooked {original()}")
    assert repr(module) == "Linear(hooked in_features=2, out_features=2, bias=True)"
    assert set(module.state_dict()) == {"weight", "bias"}
    hook.take()
    assert set(vars(module)) == before


def test_attaching_and_detaching() -> None:
    model, processor = Model(), Attached()
    processor.detach()  # without effect
    with processor.attach(model) as same:
        assert same is processor
        assert model.step(3) == 113
        with pytest.raises(InputError, match=r"attach: expected a detached .*; got .* to a Model\. Call detach\(\)"):
            processor.attach(Model())
    assert vars(model) == {"weight": 1}
    processor.attach(model).detach()
    with pytest.raises(RuntimeError), processor.attach(model):
        raise RuntimeError
    assert vars(model) == {"weight": 1}


def test_the_model_inside_is_found() -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_base_model(self) -> Any:
            return self.inner

    model, compiled = Model(), Model()
    assert target_of(model) is model
    assert target_of(Wrapper(model)) is model
    compiled._orig_mod = Wrapper(model)  # type: ignore[attr-defined]
    assert target_of(compiled) is model


@pytest.mark.parametrize("value", [None, "gpt2", 3])
def test_what_is_no_model_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"attach: expected a model with generate\(\); got "):
        target_of(value)


def test_a_processor_is_pickled_with_its_model_in_any_order() -> None:
    model = Model()
    processor = Attached().attach(model)
    for pair in ((processor, model), (model, processor), (processor,)):
        loaded = pickle.loads(pickle.dumps(pair))
        again = next(x for x in loaded if isinstance(x, Attached))
        other = again._hooks[0].model
        assert other is not model
        assert all(x is other for x in loaded if isinstance(x, Model))
        other.weight = 2
        assert other.step(3) == 116
        again.detach()
        assert other.step(3) == 6
        assert vars(other) == {"weight": 2}
    assert model.step(3) == 113


def test_a_deep_copy_of_a_processor_is_detached() -> None:
    model = Model()
    processor = Attached().attach(model)
    alone = copy.deepcopy(processor)
    alone.detach()
    with alone.attach(Model()) as attached:
        assert attached._hooks[0].model.step(1) == 111
    both, other = copy.deepcopy((processor, model))
    both.detach()
    assert other.step(1) == 1
    assert model.step(1) == 111
