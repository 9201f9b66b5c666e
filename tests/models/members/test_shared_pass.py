"""Members that are one model: one pass over all their rows, equal to a pass of each, and to PEFT's own results."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from support.tiny import build, shared

from proxytune.errors import InputError, UnsupportedModelError
from proxytune.models.members import lora_pair, shared_pass
from proxytune.models.members.adapter_state import adapter_layers, is_adapter_layer, running_as
from proxytune.models.members.composite_cache import empty_cache
from proxytune.models.members.innermost import innermost
from proxytune.models.members.member import Member
from proxytune.models.members.shared_pass import MemberPass, run_group

# PEFT calls transformers by names that the newest version has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(CUDA extension|boft_n_butterfly).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks.*:UserWarning"),  # of SHiRA
]

LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]}
MIXED = {
    "all linear layers": ("llama", peft.LoraConfig(**LORA | {"target_modules": "all-linear"})),
    "rank-stabilised, windows": ("mistral", peft.LoraConfig(**LORA, use_rslora=True)),
    "Conv1D, with biases": (
        "gpt2",
        peft.LoraConfig(**LORA | {"target_modules": ["c_attn"]}, lora_bias=True, fan_in_fan_out=True),
    ),
    "embeddings": ("gemma3", peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens", "q_proj"]})),
    "modules_to_save": ("llama", peft.LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"])),
    "trainable tokens": ("llama", peft.LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [5, 6, 7]})),
    "tied trainable tokens": ("gemma3", peft.LoraConfig(**LORA, trainable_token_indices=[5, 6, 7])),
}
ONE_BY_ONE = {
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "target_parameters": peft.LoraConfig(**LORA | {"target_modules": []}, target_parameters=["q_proj.weight"]),
    "IA3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    "LoHa": peft.LoHaConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "LoKr": peft.LoKrConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10, inference_mode=True),
    "BOFT": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, init_weights=False),
    "RandLora": peft.RandLoraConfig(target_modules=["q_proj"], r=4),
    "FourierFT": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=16),
    "MiSS": peft.MissConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "SHiRA": peft.ShiraConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "HRA": peft.HRAConfig(target_modules=["q_proj"], r=4, init_weights=False),
}


def tuned(kind: str, config: Any) -> Any:
    """A model with an adapter, "default", that does something, and another."""
    torch.manual_seed(5)
    model = peft.get_peft_model(build(kind, 2), config).eval()
    model.add_adapter("other", config)
    for name, weight in model.named_parameters():
        if "default" in name or "other" in name:
            # RandLora's large matrices would make rounding visible.
            weight.data.add_(torch.randn_like(weight), alpha=0.02 if config.peft_type == "RANDLORA" else 0.2)
    return model


def of_peft(model: Any, state: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PEFT's own logits of a text, without a cache."""
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if mask is not None:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if state is False:
        with model.disable_adapter():
            return model(**given).logits
    model.set_adapter(state or "default")
    found = model(**given).logits
    model.set_adapter("default")
    return found


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    """Logits that differ by rounding in float32, of their own size."""
    assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())


class Run:
    """Members of one model, each with a cache, and how many passes the model has made."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.caches: list[Any] = [empty_cache(member.config) for member in members]

    def __call__(self, texts: list[torch.Tensor], masks: list[Any] | None = None, keep: int = 0) -> list[torch.Tensor]:
        masks = masks or [None] * len(texts)
        places = [None if m is None else (m.cumsum(1) - 1).clamp(min=0)[:, -texts[0].shape[1] :] for m in masks]
        group = [MemberPass(*one, None) for one in zip(self.members, self.caches, texts, masks, places, strict=True)]
        return run_group(group, keep)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The rows of each pass of a model."""
    inner, rows = innermost(model), []
    handle = inner.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    yield rows
    handle.remove()


def trio(model: Any) -> list[Member]:
    inner = model.get_base_model()
    return [Member(model, "expert"), Member(inner, "antiexpert", adapter=False), Member(model, "o", adapter="other")]


def as_it_was(model: Any) -> None:
    for layer in (x for x in model.modules() if is_adapter_layer(type(x))):
        assert "forward" not in vars(layer)
        assert not layer.disable_adapters
        assert list(layer.active_adapters) == ["default"]


@torch.no_grad()
def followed(model: Any, passes: int) -> None:
    """A prompt, a rejected draft, beams and single tokens: every state's logits are PEFT's own."""
    members = trio(model)
    run, ids = Run(members), torch.randint(3, 240, (2, 12), generator=torch.Generator().manual_seed(3))
    with counted(model) as rows:
        run([ids[:, :5]] * 3)
        run([ids[:, 5:6]] * 3)
        out = run([ids[:, 6:9]] * 3)
        for cache in run.caches:
            cache.crop(-2)
        kept = torch.cat([ids[:, :7], ids[:, 9:10]], 1)
        out = run([kept[:, 7:]] * 3)
        turned = kept[[1, 1]]
        for cache in run.caches:
            cache.reorder_cache(torch.tensor([1, 1]))
        text = torch.cat([turned, ids[:, 10:]], 1)
        last = [run([text[:, i : i + 1]] * 3) for i in (8, 9)][-1]
        assert rows == [6 if passes == 1 else 2] * (6 * passes)
    assert [member.token_forwards for member in members] == [2 * 12] * 3
    for member, z, end in zip(members, out, last, strict=True):
        close(z[:, -1], of_peft(model, member.adapter, kept)[:, -1])
        close(end[:, -1], of_peft(model, member.adapter, text)[:, -1])
    assert min(float((a - b).abs().max()) for a, b in ((out[0], out[1]), (out[0], out[2]), (out[1], out[2]))) > 1e-2
    as_it_was(model)


@pytest.mark.parametrize("name", [name for name in MIXED if "windows" not in name and MIXED[name][0] != "gemma3"])
def test_mixed_adapters_take_one_pass_and_are_pefts_own(name: str) -> None:
    followed(tuned(*MIXED[name]), 1)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_cannot_be_mixed_takes_its_passes_over_the_one_copy(name: str) -> None:
    followed(tuned("llama", ONE_BY_ONE[name]), 3)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MIXED if "windows" in name or MIXED[name][0] == "gemma3"])
def test_windows_slide_for_each_member(name: str) -> None:
    model = tuned(*MIXED[name])
    run, ids = Run(trio(model)), torch.randint(3, 240, (2, 14))
    with counted(model) as rows:
        for start, stop in ((0, 6), (6, 7), (7, 12), (12, 13), (13, 14)):  # the window is 8
            out = run([ids[:, start:stop]] * 3)
        assert rows == [6] * 5
    for member, z in zip(run.members, out, strict=True):
        close(z[:, -1], of_peft(model, member.adapter, ids)[:, -1])


@torch.no_grad()
def test_members_may_read_other_texts_with_other_padding() -> None:
    model = tuned(*MIXED["all linear layers"])
    members = trio(model)
    texts = [torch.randint(3, 240, (2, 7), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    masks: list[Any] = [None, torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)]
    masks[1][0, :3] = masks[2][1, :2] = 0
    run = Run(members)
    with counted(model) as rows:
        run([text[:, :6] for text in texts], [m if m is None else m[:, :6] for m in masks], keep=1)
        out = run([text[:, 6:] for text in texts], masks)
    assert rows == [6, 6]
    for member, z, text, mask in zip(members, out, texts, masks, strict=True):
        close(z[:, -1], of_peft(model, member.adapter, text, mask)[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_members_of_one_plain_model_share_its_passes(kind: str) -> None:
    model = shared(kind, 2)
    run = Run([Member(model, "base"), Member(model, "other")])
    texts = [torch.randint(3, 240, (1, 12), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with counted(model) as rows:
        for start, stop in ((0, 9), (9, 10), (10, 12)):
            out = run([text[:, start:stop] for text in texts])
    assert rows == [2, 2, 2]
    for z, text in zip(out, texts, strict=True):
        close(z, model(text).logits[:, -2:])


def test_a_cache_grows_by_one_concatenation() -> None:
    model = shared("llama", 2)
    run, ids = Run([Member(model, "base"), Member(model, "other")]), torch.randint(3, 240, (2, 6))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            run([ids] * 2)
            keys = [cache.layers[0].keys for cache in run.caches]
            assert keys[0].untyped_storage().data_ptr() == keys[1].untyped_storage().data_ptr()
            joint = shared_pass._rows_of(keys)
            assert joint.data_ptr() == keys[0].data_ptr()  # no copy
            assert joint.shape == (4, *keys[0].shape[1:])
            for cache in run.caches:
                cache.crop(-1)
            assert shared_pass._rows_of([c.layers[0].keys for c in run.caches]).data_ptr() == keys[0].data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_states_are_read_one_after_the_other(kind: str) -> None:
    model = shared(kind, 2)
    run, ids = Run([Member(model, "base"), Member(model, "other")]), torch.randint(3, 240, (2, 6))
    with counted(model) as rows:
        out = run([ids, ids.flip(1)])
    assert rows == [2, 2]
    assert torch.equal(out[1], model(ids.flip(1)).logits)


def test_long_texts_and_gradients_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(*MIXED["all linear layers"])
    members, ids = trio(model)[:2], torch.randint(3, 240, (1, 6))
    with torch.no_grad(), counted(model) as rows:
        monkeypatch.setattr(shared_pass, "_LONG", 5)
        Run(members)([ids] * 2)
        monkeypatch.undo()
        run_group([MemberPass(m, None, ids, None, None, None) for m in members], 0)
        model.train()
        run_group([MemberPass(m, None, ids, None, None, None) for m in members], 0)
        model.eval()
    assert rows == [1, 1, 2, 1, 1]
    with counted(model) as rows:
        expert, antiexpert = run_group([MemberPass(m, None, ids, None, None, None) for m in members], 0)
    assert rows == [1, 1]
    (expert.sum() - antiexpert.sum()).backward()
    assert any(weight.grad is not None and bool(weight.grad.any()) for weight in model.parameters())
    as_it_was(model)


@torch.no_grad()
def test_sixteen_bits_are_rounded_as_by_peft() -> None:
    model = tuned(*MIXED["all linear layers"]).to(torch.bfloat16)
    ids = torch.randint(3, 240, (2, 9))
    out = run_group([MemberPass(m, None, ids, None, None, None) for m in trio(model)], 0)
    twice = [torch.cat([of_peft(model, m.adapter, torch.cat([ids] * 3))[:2]]) for m in trio(model)]
    for z, want in zip(out, twice, strict=True):
        assert torch.equal(z, want)


@torch.no_grad()
def test_nothing_stays_on_the_layers_after_an_error_and_other_threads_see_nothing() -> None:
    model = tuned(*MIXED["modules_to_save"])
    members, ids = trio(model), torch.randint(3, 240, (2, 6))
    want, found = of_peft(model, None, ids), []

    def beside(*_: Any) -> None:
        if len(found) == 0:  # once: this is called by that thread too
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(model(input_ids=ids, use_cache=False).logits))
            thread.start()
            thread.join()

    norm = model.get_base_model().model.norm
    handle = norm.register_forward_pre_hook(beside)
    run = Run(members)
    run([ids] * 3)
    handle.remove()
    torch.testing.assert_close(found[1], want, atol=1e-5, rtol=1e-5)

    def fails(*_: Any) -> None:
        raise RuntimeError("as planned")

    handle = norm.register_forward_pre_hook(fails)
    before = [cache.layers[1].keys for cache in run.caches]
    with pytest.raises(RuntimeError, match="as planned"):
        run([ids[:, :1]] * 3)
    handle.remove()
    as_it_was(model)
    assert all(cache.layers[1].keys is keys for cache, keys in zip(run.caches, before, strict=True))
    assert [member.token_forwards for member in members] == [12] * 3
    torch.testing.assert_close(of_peft(model, None, ids), want)


@torch.no_grad()
def test_layers_that_do_not_see_the_rows_of_the_batch_are_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(*MIXED["all linear layers"])
    run, ids = Run(trio(model)), torch.randint(3, 240, (2, 6))

    class Others(lora_pair.Rows):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.total += 1

    monkeypatch.setattr(shared_pass, "Rows", Others)
    with counted(model) as rows:
        out = run([ids] * 3)
        monkeypatch.undo()
        run([ids[:, :1]] * 3)
    assert rows == [6, 2, 2, 2, 2, 2, 2]  # tried once
    for member, z in zip(run.members, out, strict=True):
        close(z, of_peft(model, member.adapter, ids))
    assert [member.token_forwards for member in run.members] == [14] * 3
    as_it_was(model)


@torch.no_grad()
def test_adapters_that_are_switched_scaled_or_added_between_texts_are_seen() -> None:
    model = tuned(*MIXED["all linear layers"])
    members, ids = [*trio(model)[:2]], torch.randint(3, 240, (1, 6))

    def expert() -> torch.Tensor:
        return Run(members)([ids] * 2)[0]

    first = expert()
    model.set_adapter("other")
    assert not torch.allclose(expert(), first)
    close(expert(), model(input_ids=ids).logits)
    model.set_adapter("default")
    for layer in adapter_layers(model):
        layer.scale_layer(3.0)
    close(expert(), model(input_ids=ids).logits)
    model.base_model.set_adapter(["default", "other"])
    close(expert(), model(input_ids=ids).logits)
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="whose adapters are not merged.*'default'.*unmerge_adapter"):
        expert()


REFUSED = {
    "biases": (peft.LoraConfig(**LORA, bias="lora_only"), "bias='lora_only', which trains biases of the model itself"),
    "PiSSA": (
        peft.LoraConfig(**LORA | {"init_lora_weights": "pissa"}),
        "init_lora_weights='pissa', which takes a part out",
    ),
    "layers twice": (
        peft.LoraConfig(**LORA, layer_replication=[(0, 2), (1, 2)]),
        "layer_replication, which adds layers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_its_adapter_has_changed_cannot_be_run_without_it(name: str) -> None:
    config, says = REFUSED[name]
    model = peft.get_peft_model(build("llama", 2), config).eval()
    with pytest.raises(UnsupportedModelError, match=f"the antiexpert with adapter=False.*{says}"):
        Member(model.get_base_model(), "antiexpert", adapter=False)


def test_states_that_a_model_has_not_are_refused() -> None:
    model = tuned(*MIXED["all linear layers"])
    with pytest.raises(InputError, match="adapter of the x: expected one of default, other; False for none; got 'nix'"):
        Member(model, "x", adapter="nix")
    with pytest.raises(
        InputError, match="adapter of the x: expected a model with PEFT adapters; got False for a Llama"
    ):
        Member(shared("llama", 2), "x", adapter=False)


def test_a_state_is_for_the_time_of_a_pass_and_leaves_requires_grad_alone() -> None:
    model = tuned(*MIXED["modules_to_save"])
    marks = {name: weight.requires_grad for name, weight in model.named_parameters()}
    for state in (False, "other"):
        with running_as(model, state):
            assert [x.disable_adapters for x in adapter_layers(model)] == [state is False] * len(adapter_layers(model))
    as_it_was(model)
    assert marks == {name: weight.requires_grad for name, weight in model.named_parameters()}
