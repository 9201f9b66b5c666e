"""NaN in a member is an error in transformers' own loops too, whose argmax would take some token."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from support.tiny import shared

import proxytune
from proxytune import ProxyTuningLogitsProcessor
from proxytune.errors import NumericalError

IDS = torch.randint(3, 240, (2, 5), generator=torch.Generator().manual_seed(0))
RUN: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}


def broken(row: int | None = None) -> Any:
    """A companion with NaN for one token, or after one."""
    model = copy.deepcopy(shared("llama", 3))
    with torch.no_grad():
        if row is None:
            model.lm_head.weight[0].fill_(torch.nan)
        else:
            model.get_input_embeddings().weight[row].fill_(torch.nan)
    return model


def composed(antiexpert: Any) -> proxytune.ProxyTunedModel:
    return proxytune.wrap(
        shared("llama", 1), expert=shared("llama", 2), antiexpert=antiexpert, alpha=0.5, check_vocabulary=False
    )


@pytest.mark.parametrize(
    "mode", [{"do_sample": False}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_a_composed_model_does_not_take_a_token_of_nan(mode: dict[str, Any]) -> None:
    ids = IDS[:1] if "prompt_lookup_num_tokens" in mode else IDS
    with pytest.raises(NumericalError, match=r"row 0 of \d.*NaN or \+inf among the members' combined logits"):
        composed(broken()).generate(ids, **RUN, **mode)


def test_nan_in_the_middle_of_a_text_is_found() -> None:
    sound = composed(shared("llama", 3)).generate(IDS, do_sample=False, **RUN)
    model = composed(broken(int(sound[1, 5])))
    if int(sound[1, 5]) in IDS:
        pytest.fail("the prompt must not hold it")
    with pytest.raises(NumericalError, match="row 1 of 2"):
        model.generate(IDS, do_sample=False, **RUN)


def test_remove_invalid_values_goes_on() -> None:
    assert composed(broken()).generate(IDS, do_sample=False, remove_invalid_values=True, **RUN).shape == (2, 8)
    base = shared("llama", 1)
    with ProxyTuningLogitsProcessor(shared("llama", 2), broken(), check_vocabulary=False).attach(base):
        assert base.generate(IDS, do_sample=False, remove_invalid_values=True, **RUN).shape == (2, 8)


def test_a_draft_may_propose_anything() -> None:
    model = composed(shared("llama", 3))
    want = model.generate(IDS[:1], do_sample=False, **RUN)
    assert torch.equal(model.generate(IDS[:1], do_sample=False, assistant_model=broken(), **RUN), want)


@pytest.mark.parametrize("attached", [True, False])
def test_a_companion_of_a_processor_is_named(attached: bool) -> None:
    base = shared("llama", 1)
    processor = ProxyTuningLogitsProcessor(shared("llama", 2), broken(), check_vocabulary=False)
    given = {} if attached else {"logits_processor": [processor]}
    with (
        processor.attach(base) if attached else contextlib.nullcontext(),
        pytest.raises(NumericalError, match="NaN or .* among the antiexpert's logits"),
    ):
        base.generate(IDS, do_sample=False, **given, **RUN)
