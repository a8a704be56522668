"""Record what Dream's model and its sampler compute, for `test_dream.py`.

    python tests/interop/record_dream.py REPOSITORY

REPOSITORY is a checkout of NVlabs/Fast-dLLM (recorded at its commit 24cc59e), whose `dream/model` holds the authors'
model with a cache added that is not used here, and their sampler. Needs transformers 4.46. Writes
`dream_authors.safetensors` beside this file: of each case the weights, tokens, their logits, the gradients of a cross
entropy of the tokens that follow, and the tokens after each step of the sampler, in float32 on a CPU.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
MASK, PROMPT, NEW = 17, 5, 8
COMMON = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 19,
    "rope_theta": 500.0,
    "mask_token_id": MASK,
    "pad_token_id": None,
}
CASES = {
    "plain": {},
    "other": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}
ORDERS = {"confidence": "maskgit_plus", "margin": "topk_margin"}  # the zoo's names, and theirs


def unmasked(step: int, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Logits by which the mask and the tokens beyond it, which are nobody's, are never sampled."""
    logits[..., MASK:] = -torch.inf
    return logits


def record(options: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config of a case, and its tensors."""
    made = importlib.import_module("dream.model.configuration_dream").DreamConfig
    modeling = importlib.import_module("dream.model.modeling_dream")
    sampler = importlib.import_module("dream.model.generation_utils")
    config = made(**{**COMMON, **options})
    torch.manual_seed(0)
    model = modeling.DreamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    tokens = torch.randint(MASK, (2, 11))
    logits = model(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = {"tokens": tokens, "logits": logits.detach()}
    for name, parameter in model.named_parameters():
        found[f"weights.{name}"] = parameter.detach()
        found[f"gradients.{name}"] = parameter.grad
    for order, theirs in ORDERS.items():
        how = sampler.DreamGenerationConfig(
            max_length=PROMPT + NEW,
            mask_token_id=MASK,
            steps=NEW // 2,
            eps=-1e-4,  # of the last time: below 0, so that no count of theirs, rounded down, misses a token
            alg=theirs,
            return_dict_in_generate=True,
            output_history=True,
        )
        sample = sampler.DreamGenerationMixin._sample
        with torch.no_grad():
            out = sample(model, tokens[:, :PROMPT], None, how, lambda i, x, logits: x, unmasked)
        found[f"sampled.{order}"] = torch.stack(out.history)
    told = {**COMMON, **options}
    return {"architectures": ["DreamModel"], "model_type": "Dream", **told}, found


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    configs, tensors = {}, {}
    for name, options in CASES.items():
        configs[name], found = record(options)
        tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in found.items()}
    save_file(tensors, HERE / "dream_authors.safetensors", metadata={"configs": json.dumps(configs)})


if __name__ == "__main__":
    main()
