"""Run as a script in a fresh process: loads a directory with torch and transformers alone and compares its logits.

Standard input: an .npz with `directory`, `device`, `memory` (bytes of this machine that the weights may take; what is beyond
stays on disk; negative: no limit), and for each number n of a case `input_ids_n` and `attention_mask_n`, int64 [documents,
tokens], and `logits_n`, float32 [documents, last tokens, vocabulary]. The last line of standard output: JSON with the
differences, the keys that do not fit and the generated tokens.
"""

import io
import json
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

_STEPPED = 4  # tokens that are decoded one by one

Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def compare(directory: str, device: str, memory: int, cases: list[Case]) -> dict[str, Any]:
    """Load `directory` and compare: the largest absolute difference, the largest logit, loading trouble, tokens generated."""
    with tempfile.TemporaryDirectory() as scratch:
        model, info = _load(directory, device, memory, scratch)
        with torch.no_grad():
            found = [_logits(model, device, *case) for case in cases]
            longest = max(cases, key=lambda case: case[0].shape[1])
            stepped = _decoded(model, device, longest[0][:1])
            prompt = torch.from_numpy(cases[-1][0][:1]).to(device)
            generated = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1
            )
    pairs = [(got, logits[mask[:, -logits.shape[1] :] == 1]) for got, (_, mask, logits) in zip(found, cases, strict=True)]
    fits = all(got.shape == given.shape for got, given in pairs)
    expected = longest[2][0, -_STEPPED:]
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype),
        "keys": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])),
        "vocabulary": int(found[0].shape[-1]),
        "difference": max(float(np.abs(got - given).max()) for got, given in pairs) if fits else None,
        "largest": max(float(np.abs(given).max()) for _, given in pairs),
        # Other kernels than those of the whole pass: as a share of the logits, over all of them.
        "cached": float(np.linalg.norm(stepped - expected) / (np.linalg.norm(expected) or 1.0)) if fits else None,
        "generated": int(generated.shape[1] - prompt.shape[1]),
    }


def _load(directory: str, device: str, memory: int, scratch: str) -> tuple[Any, dict[str, Any]]:
    limits: dict[str, Any] = {}
    if memory >= 0:
        room: dict[str | int, int] = {"cpu": memory}
        if device == "cuda":
            room[0] = int(0.8 * torch.cuda.mem_get_info()[0])
        limits = {"device_map": "auto", "max_memory": room, "offload_folder": scratch}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True, **limits
    )
    model, info = loaded
    return (model if limits else model.to(device)).eval(), info


def _logits(model: Any, device: str, input_ids: np.ndarray, attention_mask: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Of the last tokens of each document that are not padding: float32 [tokens, vocabulary]."""
    ids, mask = (torch.from_numpy(part).to(device) for part in (input_ids, attention_mask))
    last = logits.shape[1]
    found = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=last).logits.float().cpu().numpy()
    return found[attention_mask[:, -last:] == 1]


def _decoded(model: Any, device: str, input_ids: np.ndarray) -> np.ndarray:
    """The logits of the last tokens of a document [1, tokens], each behind a cache of those before: [tokens, vocabulary]."""
    ids = torch.from_numpy(input_ids).to(device)
    cache = model(input_ids=ids[:, :-_STEPPED], use_cache=True, logits_to_keep=1).past_key_values
    rows = []
    for at in range(ids.shape[1] - _STEPPED, ids.shape[1]):
        output = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        rows.append(output.logits[0].float().cpu().numpy())
    return np.concatenate(rows)


if __name__ == "__main__":
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as given:
        numbers = range(sum(name.startswith("logits_") for name in given.files))
        read = [(given[f"input_ids_{n}"], given[f"attention_mask_{n}"], given[f"logits_{n}"]) for n in numbers]
        answer = compare(str(given["directory"]), str(given["device"]), int(given["memory"]), read)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
