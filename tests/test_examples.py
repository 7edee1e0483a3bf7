# SPDX-License-Identifier: Apache-2.0
"""The decoders in examples/ against transformers' LlamaForCausalLM, on a tiny random model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normkit import MappingWeights, MissingTensorError
from normkit.demo import load_example

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from . import tiny_llama  # noqa: E402

PROMPT = [5, 101, 17, 8, 251, 33, 33, 2, 90, 150, 61]
LOGIT_BOUND = 1e-4


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request: pytest.FixtureRequest) -> Any:
    """transformers' own model."""
    return tiny_llama.model(tied=request.param)


@pytest.fixture(params=["torch", "jax"])
def framework(request: pytest.FixtureRequest) -> str:
    """A framework with a decoder."""
    pytest.importorskip(request.param)
    return str(request.param)


def decoder_of(framework: str, reference: Any, tensors: dict[str, Any] | None = None) -> Any:
    """The example's decoder on the reference's weights, or on others, as arrays of its own framework."""
    tensors = dict(reference.state_dict()) if tensors is None else tensors
    if framework == "jax":
        import jax.numpy as jnp

        tensors = {name: jnp.asarray(tensor.numpy()) for name, tensor in tensors.items()}
    return load_example(f"llama_{framework}").Llama(reference.config, MappingWeights(tensors))


def logits_of(framework: str, decoder: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """The logits of a whole sequence."""
    with torch.no_grad():
        return np.asarray(decoder(torch.tensor(ids) if framework == "torch" else ids))


def reference_logits(reference: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """The same from transformers."""
    with torch.no_grad():
        return np.asarray(reference(torch.tensor([ids])).logits[0])


def test_logits_equal_those_of_transformers(framework: str, reference: Any) -> None:
    logits = logits_of(framework, decoder_of(framework, reference), PROMPT)
    np.testing.assert_allclose(logits, reference_logits(reference, PROMPT), rtol=0, atol=LOGIT_BOUND)


def test_cached_decoding_equals_the_full_forward(framework: str, reference: Any) -> None:
    decoder = decoder_of(framework, reference)
    full = logits_of(framework, decoder, PROMPT)
    parts = [PROMPT[:4], PROMPT[4:5], PROMPT[5:9], PROMPT[9:]]
    pieces = []
    if framework == "torch":
        cache: list[Any] = []
        with torch.no_grad():
            pieces = [np.asarray(decoder(torch.tensor(part), cache)) for part in parts]
    else:
        import jax.numpy as jnp

        cache, start = decoder.new_cache(len(PROMPT) + 5), 0
        for part in parts:
            logits, cache = decoder.forward(decoder.parameters, jnp.asarray(part), cache, jnp.asarray(start))
            pieces.append(np.asarray(logits))
            start += len(part)
    np.testing.assert_allclose(np.concatenate(pieces), full, rtol=0, atol=LOGIT_BOUND)


def test_generated_tokens_equal_those_of_transformers(framework: str, reference: Any) -> None:
    ids = torch.tensor([PROMPT])
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    tokens = list(decoder_of(framework, reference).generate(PROMPT, 24))
    assert tokens == expected[0, len(PROMPT) :].tolist()
    assert len(set(tokens)) > 4, "a constant answer would show nothing"


@pytest.mark.parametrize("part", ["input_layernorm", "post_attention_layernorm", "norm", "q_proj", "down_proj"])
def test_every_weight_matters(framework: str, reference: Any, part: str) -> None:
    """Logits move beyond the bound when one tensor is 2 % larger, so the comparisons above can fail."""
    changed = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    prefix = "model" if part == "norm" else "model.layers.1"
    middle = {"q_proj": ".self_attn", "down_proj": ".mlp"}.get(part, "")
    changed[f"{prefix}{middle}.{part}.weight"] *= 1.02
    logits = logits_of(framework, decoder_of(framework, reference, changed), PROMPT)
    assert abs(logits - reference_logits(reference, PROMPT)).max() > 10 * LOGIT_BOUND


def test_a_missing_norm_is_named(framework: str, reference: Any) -> None:
    tensors = dict(reference.state_dict())
    del tensors["model.layers.2.input_layernorm.weight"]
    with pytest.raises(MissingTensorError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        decoder_of(framework, reference, tensors)
