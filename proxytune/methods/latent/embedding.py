"""Mixtures of a causal LM's embeddings.

The outputs of the embedding *module* are mixed, as some families scale them. Families with a second look-up of the ids
(the per-layer embeddings of Gemma 3n and Gemma 4) get a mixture of those too. A trial forward pass checks once per
model that it depends on the ids in no other way.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from proxytune.errors import UnsupportedModelError
from proxytune.models.members.embedding_table import device_of, matrix_of, rows_of
from proxytune.models.members.innermost import innermost
from proxytune.models.members.whole_text import reads_whole_text
from proxytune.ops import Impl
from proxytune.ops.mix import mix
from proxytune.ops.noise import Noise

__all__ = ["Embedding", "Inputs"]

Inputs = dict[str, torch.Tensor]
"""Arguments of a forward pass that replace `input_ids`, `[B, N, …]` each: `inputs_embeds` and any others."""

_PER_LAYER = "get_per_layer_inputs"
_tried: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Embedding:
    """The embedding of a model: from ids to the inputs that replace them.

    Attributes:
        role: The model's name in messages.
        model: The causal LM.
    """

    def __init__(self, model: PreTrainedModel, role: str = "model") -> None:
        """Find the embedding of a decoder-only causal LM (or a PEFT model around one), and check it once per model.

        Raises:
            UnsupportedModelError: If the model takes no embeddings, has none, or uses its ids in other ways too.
        """
        self.role, self.model = role, model
        inner = innermost(model)
        module = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
        takes = "inputs_embeds" in inspect.signature(inner.forward).parameters
        if not isinstance(module, nn.Module) or not takes:
            lacks = "inputs_embeds in its forward pass" if isinstance(module, nn.Module) else "an input embedding"
            raise self._refusal(
                "an input embedding, and a forward pass that takes inputs_embeds",
                f"{type(inner).__name__} without {lacks}",
            )
        if role != "model" and (why := reads_whole_text(model)):
            expected = "a model with a cache of transformers, which holds what latent steps put in"
            raise self._refusal(expected, f"{type(inner).__name__}, which {why}")
        self._module: nn.Module = module
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
        sized = getattr(decoder.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None)
        self._per_layer = getattr(decoder, _PER_LAYER, None) if sized else None
        if inner not in _tried and self._try_out():
            _tried.add(inner)

    @property
    def device(self) -> torch.device:
        """The device for the ids."""
        return device_of(self.model)

    @property
    def rows(self) -> int | None:
        """How many ids it can embed; None if the module does not tell."""
        return rows_of(self._module)

    def of(self, ids: torch.Tensor) -> Inputs:
        """The inputs for ids `[B, N]`, `[B, N, …]` each."""
        ids = ids.to(self.device)
        inputs: Inputs = {"inputs_embeds": self._module(ids)}
        if self._per_layer is not None:
            inputs["per_layer_inputs"] = self._second(ids)
        return inputs

    def mixed(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        tokens: torch.Tensor,
        soft: torch.Tensor,
        sigma: float,
        noise: Noise,
        impl: Impl,
    ) -> Inputs:
        """The inputs for mixtures of several ids.

        Args:
            ids: `[B, K]`, int64: the candidates.
            weights: `[B, K]`, float32, summing to 1.
            tokens: `[B]`, int64: the emitted tokens.
            soft: `[B]`, bool: which rows are mixed; the others get the embedding of their token, bit for bit.
            sigma: Gaussian noise on the mixture of the embeddings, relative to its root mean square.
            noise: The keys of that noise.
            impl: As in `proxytune.ops.mix.mix`.

        Returns:
            `[B, 1, …]` each.
        """
        place = self.device
        ids, weights, tokens, soft = (x.to(place) for x in (ids, weights, tokens, soft))
        keys = Noise(*(x.to(place) for x in (noise.seed, noise.row, noise.position, noise.branch)))
        table = self._table()
        if table is not None:
            x = mix(table, ids, weights, tokens=tokens, soft=soft, sigma=sigma, noise=keys, impl=impl)
            return {"inputs_embeds": x[:, None]}
        out: Inputs = {}
        for name, rows in self.of(torch.cat([ids, tokens[:, None]], 1)).items():  # [B, K + 1, …]
            flat = rows.flatten(2).flatten(0, 1)  # [B · (K + 1), D]
            place_of = torch.arange(len(flat), device=place).view(rows.shape[:2])
            x = mix(
                flat,
                place_of[:, :-1],
                weights,
                tokens=place_of[:, -1],
                soft=soft,
                # No noise on the second look-up: its keys would be those of the first.
                sigma=sigma if name == "inputs_embeds" else 0.0,
                noise=keys,
                impl=impl,
            )
            out[name] = x.view(rows.shape[0], 1, *rows.shape[2:])
        return out

    def _table(self) -> torch.Tensor | None:
        """The weight, if the module only looks up its rows."""
        module = self._module
        plain = type(module) is nn.Embedding and module.max_norm is None and self._per_layer is None
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        return matrix_of(module) if plain and not hooked else None

    def _second(self, ids: torch.Tensor) -> torch.Tensor:
        assert self._per_layer is not None
        more = {"inputs_embeds": None} if "inputs_embeds" in inspect.signature(self._per_layer).parameters else {}
        inputs: torch.Tensor = self._per_layer(ids, **more)
        return inputs

    @torch.no_grad()
    def _try_out(self) -> bool:
        """Compare passes over ids and over their embeddings; returns whether they could be compared."""
        if self.model.training:  # dropout would make any two passes differ
            return False
        ids = torch.arange(1, 4, device=self.device)[None] % (self.rows or 4)  # [1, 3]
        given: dict[str, Any] = {"use_cache": False}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            # Some models keep those of the running generation.
            given["position_ids"] = torch.arange(3, device=self.device)[None]
        try:
            by_ids = self.model(input_ids=ids, **given).logits.float().log_softmax(-1)
            by_embeddings = self.model(**self.of(ids), **given).logits.float().log_softmax(-1)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise self._refusal(
                "a forward pass on inputs_embeds", f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
        # Only ids with some probability: the value of a mask in the head does not matter.
        apart = (by_ids - by_embeddings).abs()[by_ids > -20.0]
        if not apart.numel():
            return False
        if not float(apart.max()) <= 1e-2:
            raise self._refusal(
                "a forward pass that depends on the ids through their embedding alone",
                f"log-probabilities that differ by {float(apart.max()):.3g} nats between input_ids and inputs_embeds",
            )
        return True

    def _refusal(self, expected: str, got: str) -> UnsupportedModelError:
        name = getattr(self.model.config, "model_type", type(self.model).__name__)
        error = UnsupportedModelError.of(
            f"latent steps: the {self.role} ({name})",
            expected=expected,
            got=got,
            remedy="Use another model, or decode without latent steps.",
        )
        assert isinstance(error, UnsupportedModelError)
        return error
