"""A member that changes between two calls, by whatever means, reads the text anew, or its old cache is refused."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from support.tiny import build, shared
from torch import nn

import proxytune
from proxytune import ForkDecoding, FusedDecoding, ProxyTuningLogitsProcessor, SiblingDecoding, SpeculativeDecoding
from proxytune.errors import CacheError
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.fingerprint import Fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

Change = Callable[[Any, Path], Any]
ALPHA = 2.0
RUN: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter to swap in."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("adapter")
    tuned(5).save_pretrained(folder, selected_adapters=["default"])
    return folder


def tuned(seed: int = 3) -> Any:
    return copy.deepcopy(template(seed))


@functools.cache
def template(seed: int) -> Any:
    model = build("llama", 2)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    return model.eval()


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0]


def scale(model: Any, saved: Path) -> None:
    layer_of(model).self_attn.q_proj.scaling["default"] *= 8


def load_again(model: Any, saved: Path) -> None:
    model.set_adapter("other")
    model.delete_adapter("default")
    model.load_adapter(saved, "default")
    model.set_adapter("default")


def assign(model: Any, saved: Path) -> None:
    state = {name: x * 0.7 for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def through_data(model: Any, saved: Path) -> None:
    layer_of(model).mlp.up_proj.weight.data.mul_(0.5)


def new_data(model: Any, saved: Path) -> None:
    weight = layer_of(model).mlp.up_proj.weight
    weight.data = weight.data * 0.5


def replace(model: Any, saved: Path) -> None:
    layer_of(model).mlp.act_fn = nn.Tanh()


def edit_buffer(model: Any, saved: Path) -> None:
    model.get_base_model().model.rotary_emb.inv_freq.mul_(3)


def steer(model: Any, saved: Path) -> Any:
    return layer_of(model).register_forward_hook(lambda module, args, output: output * torch.linspace(0, 3, 32))


def patch(model: Any, saved: Path) -> None:
    mlp = layer_of(model).mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 3


CHANGES: dict[str, Change] = {
    "scaled adapter": scale,
    "hot-swapped adapter": lambda model, saved: hotswap_adapter(model, str(saved), "default"),
    "adapter loaded again": load_again,
    "switched adapter": lambda model, saved: model.set_adapter("other"),
    "disabled adapter": lambda model, saved: model.base_model.disable_adapter_layers(),
    "assigned weights": assign,
    "weights edited through .data": through_data,
    "new .data": new_data,
    "replaced submodule": replace,
    "edited buffer": edit_buffer,
    "added hook": steer,
    "replaced forward": patch,
}


def others() -> tuple[Any, Any]:
    return shared("qwen3", 1), shared("llama", 2)


def expected(expert: Any, ids: torch.Tensor) -> torch.Tensor:
    base, antiexpert = others()
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
    return model.generate(ids, **RUN).sequences


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_processor_reads_a_changed_companion_anew(change: str, saved: Path) -> None:
    ids = torch.randint(3, 240, (1, 9))
    expert, (base, antiexpert) = tuned(), others()
    one = ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False)
    handed_over = {**RUN, "logits_processor": [one]}
    first = base.generate(ids, **handed_over).sequences
    assert torch.equal(first, expected(expert, ids))
    CHANGES[change](expert, saved)
    # On from the last text, which this processor cannot tell from a step; then from a part of it, as after a rejected
    # draft; and from the prompt.
    for prompt in (first, first[:, :11], ids):
        assert torch.equal(base.generate(prompt, **handed_over).sequences, expected(expert, prompt))
        layer_of(expert).mlp.gate_proj.weight.data.mul_(1.3)  # for the next prompt

    expert = tuned()
    with ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False).attach(base) as one:
        kept = base.generate(ids, **RUN)
        CHANGES[change](expert, saved)
        want = expected(expert, kept.sequences)
        before = one.token_forwards
        assert torch.equal(base.generate(kept.sequences, **{CACHE: kept.past_key_values}, **RUN).sequences, want)
        read = {role: n - before[role] for role, n in one.token_forwards.items()}
        assert read == {"expert": 12 + 2, "antiexpert": 1 + 2}, "only the member that changed reads the text anew"
        assert torch.equal(base.generate(ids, **RUN).sequences, expected(expert, ids))


def test_attached_nothing_has_to_be_seen(saved: Path) -> None:
    """A hook whose own strength changes, and a single weight edited through `.data`, leave no trace."""
    expert, (base, antiexpert), strength = tuned(), others(), [1.0]
    layer_of(expert).register_forward_hook(lambda module, args, output: output * strength[0])
    ids = torch.randint(3, 240, (2, 9))
    with ProxyTuningLogitsProcessor(expert, antiexpert, ALPHA, check_vocabulary=False).attach(base):
        before = base.generate(ids, **RUN).sequences
        strength[0] = -1.0
        assert torch.equal(base.generate(ids, **RUN).sequences, expected(expert, ids))
        assert not torch.equal(expected(expert, ids), before)
        expert.get_input_embeddings().weight.data[int(ids[0, 2])] *= 9
        assert torch.equal(base.generate(ids, **RUN).sequences, expected(expert, ids))


LOOPS: dict[str, dict[str, Any]] = {
    "generate": {},
    "beams": {"num_beams": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "fused": {"custom_generate": FusedDecoding()},
    "speculation": {"custom_generate": SpeculativeDecoding()},
    "tree": {"custom_generate": ForkDecoding(threshold=1.0, seed=0), "do_sample": True},
    "siblings": {"custom_generate": SiblingDecoding(threshold=1.0, seed=0), "do_sample": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_from_before_the_change_is_refused_by_the_composed_model(change: str, saved: Path) -> None:
    expert, (base, antiexpert) = tuned(), others()
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
    ids = torch.randint(3, 240, (1, 9))
    first = model.generate(ids, **RUN)
    longer, cache = torch.cat([first.sequences, ids], 1), first.past_key_values
    going = model.generate(longer, **{CACHE: copy.deepcopy(cache)}, **RUN).sequences
    assert torch.equal(going, model.generate(longer, **RUN).sequences)
    undo = CHANGES[change](expert, saved)
    names = LOOPS if change == "scaled adapter" else ["generate", "siblings"]
    for name in names:
        with pytest.raises(CacheError, match="filled before the expert changed .*: generate.. reads the whole text"):
            model.generate(longer, **{CACHE: copy.deepcopy(cache)}, **RUN | LOOPS[name])
    # Between single tokens in a loop of one's own, edits through `.data` are not seen.
    new = longer[:, 11:] if "swapped" in change or "through" in change else longer[:, 11:12]
    with pytest.raises(CacheError, match="before the expert changed"):
        model(new, **{CACHE: cache})
    assert torch.equal(model.generate(longer, **RUN).sequences, expected(expert, longer))
    if change == "switched adapter":  # back again, the cache is right again
        expert.set_adapter("default")
        assert torch.equal(model.generate(longer, **{CACHE: cache}, **RUN).sequences, going)
    if change == "added hook":
        undo.remove()
        assert torch.equal(model.generate(longer, **{CACHE: cache}, **RUN).sequences, going)


def test_a_cache_that_was_reset_is_not_the_old_one() -> None:
    expert, (base, antiexpert) = tuned(), others()
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
    ids = torch.randint(3, 240, (1, 9))
    cache = model(ids).past_key_values
    cache.crop(-9)
    expert.set_adapter("other")
    got = model.generate(ids, **{CACHE: cache}, **RUN)
    assert torch.equal(got.sequences, expected(expert, ids))
    expert.set_adapter("default")
    with pytest.raises(CacheError, match="before the expert changed"):
        model.generate(torch.cat([got.sequences, ids], 1), **{CACHE: cache}, **RUN)


def test_looking_at_hidden_states_changes_nothing() -> None:
    model = build("llama", 1)
    before = Fingerprint(model)
    model(torch.tensor([[3, 4]]), output_hidden_states=True)
    assert before.holds(model)
    assert copy.deepcopy(before) is before


def test_no_weights_are_kept_alive() -> None:
    model = build("llama", 1)
    before = Fingerprint(model)
    refs = before._objects
    del model
    assert all(ref() is None for ref in refs)


def test_fingerprints_are_taken_again_only_of_members_that_changed() -> None:
    base, antiexpert = others()
    model = proxytune.wrap(base, expert=build("llama", 4), antiexpert=antiexpert, alpha=ALPHA, check_vocabulary=False)
    ids = torch.randint(3, 240, (1, 9))

    def taken() -> tuple[Any, dict[str, Fingerprint]]:
        out = model.generate(ids, **RUN)
        return out, dict(model._fingerprints)

    (first, before), (_, again) = taken(), taken()
    assert before == again
    model.expert.lm_head.weight.data.mul_(1.5)
    second, after = taken()
    assert [role for role in after if after[role] is not before[role]] == ["expert"]
    more = torch.cat([first.sequences, ids], 1)
    with pytest.raises(CacheError, match="before the expert changed"):
        model.generate(more, **{CACHE: first[CACHE]}, **RUN)
    model.generate(torch.cat([second.sequences, ids], 1), **{CACHE: second[CACHE]}, **RUN)
    # Prompts run under inference mode where nobody sees it, and not where a hook does.
    seen: list[bool] = []
    model.expert.register_forward_hook(lambda module, args, out: seen.append(out.logits.is_inference()))
    model.generate(ids, **RUN)
    assert seen == [False] * 3
