# SPDX-License-Identifier: Apache-2.0
"""`normkit demo`: decode text with a real LLaMA in PyTorch and JAX, and check both against transformers.

The decoders are examples/llama_torch.py and examples/llama_jax.py, whose norms are normkit's.
Everything is greedy and in float32.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .errors import NormkitError, OptionError, UnsupportedError
from .fetch import MODEL_NAME, cache_folder, default_model
from .models import Model, read_model, require

LOGIT_BOUND = 1e-3
"""The largest difference between two logits of the same model in float32 that is still agreement."""

DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."
"""A question whose answer is longer than 64 tokens."""


@dataclass(frozen=True)
class Decoded:
    """What one framework made of the prompt.

    Attributes:
        name: "torch", "jax" or "transformers".
        tokens: The greedy tokens.
        logits: Computes the logits (tokens, vocabulary) of a whole sequence, without a cache.
    """

    name: str
    tokens: list[int]
    logits: Callable[[Sequence[int]], np.ndarray[Any, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `normkit demo` to a parser."""
    parser.add_argument(
        "--model", type=Path, help=f"GGUF file or Hugging Face folder of a LLaMA (default: fetch {MODEL_NAME} by pip)"
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="what to ask (default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens to decode (default: %(default)s)")
    parser.add_argument("--framework", choices=("torch", "jax", "both"), default="both", help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), help="where the fetched model is kept (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        arguments: What a parser with `add_arguments` returned.

    Returns:
        The exit code: 0 if all agree, 1 if they do not, 2 if the demo could not run.
    """
    try:
        return _run(arguments)
    except NormkitError as error:
        print(f"normkit demo: {error}", file=sys.stderr)
        return 2


def load_example(name: str) -> ModuleType:
    """Import a file of the examples, which lie inside an installed normkit and beside normkit in its sources.

    Args:
        name: The file's name without .py, such as "llama_torch".

    Returns:
        The module.

    Raises:
        UnsupportedError: Neither place has it.
    """
    places = [Path(__file__).parent / "examples", Path(__file__).parent.parent / "examples"]
    for path in (place / f"{name}.py" for place in places):
        spec = importlib.util.spec_from_file_location(f"normkit_examples_{name}", path)
        if path.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise UnsupportedError(f"{name}.py is in none of {', '.join(map(str, places))}; install normkit again")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.tokens < 1:
        raise OptionError(f"--tokens must be at least 1, got {arguments.tokens}")
    frameworks = ("torch", "jax") if arguments.framework == "both" else (arguments.framework,)
    require("torch", "transformers", "safetensors", *frameworks)
    # A model can say what a terminal's character set cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    model = read_model(arguments.model or default_model(arguments.cache))
    prompt = model.encode(arguments.prompt)
    room = model.config.max_position_embeddings
    if not 1 <= len(prompt) <= room - arguments.tokens:
        raise OptionError(
            f"the prompt has {len(prompt)} tokens and --tokens is {arguments.tokens}; "
            f"the prompt needs at least one, and both together fit {room} positions of {model.name}"
        )
    config = model.config
    print(f"Model   {model.name}: LLaMA, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, float32")
    print(f"Prompt  {arguments.prompt}  ({len(prompt)} tokens)")
    # On a GPU JAX would otherwise round the factors of float32 products to ten bits; torch does not unless asked.
    exact = importlib.import_module("jax").default_matmul_precision("highest") if "jax" in frameworks else nullcontext()
    with exact:
        decoded = [_decode(framework, model, prompt, arguments.tokens) for framework in frameworks]
        return _check(_decode_transformers(model, prompt, arguments.tokens), decoded, prompt)


def _decoder(framework: str, model: Model) -> tuple[Any, str]:
    """Return the decoder of a framework, and the name of the device that it runs on."""
    module = load_example(f"llama_{framework}")
    decoder = module.Llama(model.config, model.weights(framework))
    if framework == "jax":
        return decoder, importlib.import_module("jax").devices()[0].platform
    torch = importlib.import_module("torch")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return decoder.float().to(device), device.type


def _decode(framework: str, model: Model, prompt: list[int], count: int) -> Decoded:
    decoder, device = _decoder(framework, model)
    version = importlib.import_module(framework).__version__
    print(f"\n--- {framework} {version} on {device} ---")
    tokens: list[int] = []
    generated = decoder.generate(prompt, count)
    for piece in model.stream(_recorded(generated, tokens)):
        print(piece, end="", flush=True)
    shown = len(tokens)
    # The check wants as many tokens as were asked for, also past the end of the answer.
    tokens += generated
    ended = f"; the answer ended at token {shown}, the rest is decoded for the check" if shown < count else ""
    print(f"\n[{count} tokens{ended}]")
    _print_choice(framework, decoder)
    return Decoded(framework, tokens, lambda ids: _logits(framework, decoder, ids))


def _recorded(tokens: Iterable[int], record: list[int]) -> Iterator[int]:
    for token in tokens:
        record.append(token)
        yield token


def _logits(framework: str, decoder: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    if framework == "jax":
        return np.asarray(decoder(ids))
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        logits = decoder(torch.tensor(ids, device=next(decoder.parameters()).device))
    return np.asarray(logits.cpu())


def _print_choice(framework: str, decoder: Any) -> None:
    """Print which implementation the norms of this decoder use, and why."""
    frontend = importlib.import_module(f"normkit_{framework}")
    norm = decoder.norm if framework == "torch" else decoder.parameters.norm
    weight = norm.weight.detach() if framework == "torch" else norm.weight
    x = weight[None]
    verdicts = frontend.explain("add_rms_norm", x, x, weight)
    runs = next((verdict.name for verdict in verdicts if verdict.accepted), "none")
    print(f"normkit: add_rms_norm of x {tuple(x.shape)} in float32 runs as {runs!r}")
    for verdict in verdicts:
        state = "runs" if verdict.name == runs else "could run" if verdict.accepted else "no"
        print(f"  {verdict.name:<10} {state:<9}  {verdict.reason}")


def _decode_transformers(model: Model, prompt: list[int], count: int) -> Decoded:
    torch = importlib.import_module("torch")
    reference = model.reference()
    ids = torch.tensor([prompt])
    # Without an end-of-answer token it decodes as many tokens as the others.
    generated = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )

    def logits(sequence: Sequence[int]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return np.asarray(reference(torch.tensor([list(sequence)])).logits[0])

    return Decoded("transformers", generated[0, len(prompt) :].tolist(), logits)


def _check(reference: Decoded, decoded: list[Decoded], prompt: list[int]) -> int:
    """Print how far all agree on the prompt and the reference's tokens, and return the exit code."""
    sequence = [*prompt, *reference.tokens]
    logits = {each.name: each.logits(sequence) for each in (reference, *decoded)}
    expected = logits[reference.name]
    version = importlib.import_module("transformers").__version__
    print(f"\n--- Check against LlamaForCausalLM of transformers {version}, same weights, float32 ---")
    print(f"Logits: {expected.shape[0]} positions x {expected.shape[1]}, largest value {abs(expected).max():.1f}")
    others = [each.name for each in decoded]
    pairs = [(name, reference.name) for name in others] + ([("torch", "jax")] if len(others) == 2 else [])
    agreed = True
    for first, second in pairs:
        difference = float(abs(logits[first] - logits[second]).max())
        # Written so that NaN disagrees.
        within = difference <= LOGIT_BOUND
        agreed &= within
        print(f"  {first} - {second:<12}  {difference:.2e}  {'within' if within else 'BEYOND'} {LOGIT_BOUND:.0e}")
    print(f"Tokens: {len(reference.tokens)}, greedy")
    for each in decoded:
        same, sentence = _compare_tokens(each.tokens, reference.tokens, expected[len(prompt) - 1 :])
        agreed &= same
        print(f"  {each.name} = {reference.name:<12}  {sentence}")
    print("They agree." if agreed else "They DISAGREE.")
    return 0 if agreed else 1


def _compare_tokens(tokens: Sequence[int], expected: Sequence[int], logits: np.ndarray[Any, Any]) -> tuple[bool, str]:
    """Compare two greedy decodings; `logits` are the reference's, from the one that chose the first token on."""
    differing = (i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
    first = next(differing, None)
    if first is None:
        return True, f"{len(expected)} of {len(expected)} equal"
    # Two logits that are nearer than both bounds may swap by rounding alone; what follows is then another text.
    margin = float(logits[first, expected[first]] - logits[first, tokens[first]])
    if margin <= 2 * LOGIT_BOUND:
        return True, f"the first {first} of {len(expected)} equal, then a tie within {margin:.1e}"
    return False, f"the first {first} of {len(expected)} equal; token {first} is {margin:.1e} below the best"
