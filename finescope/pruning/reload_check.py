"""Run as a script in a fresh process: loads a directory with torch and transformers alone and compares its logits.

Standard input: an .npz with `directory`, `device`, `input_ids` int64 [documents, tokens], `logits` float32 [documents, tokens,
vocabulary]. The last line of standard output: JSON with the differences, the keys that do not fit and the generated tokens.
"""

import io
import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def compare(directory: str, device: str, input_ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Load `directory` and compare: the largest absolute difference, the largest logit, loading trouble, tokens generated."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True, output_loading_info=True)
    model, info = loaded
    model = model.to(device).eval()
    ids = torch.from_numpy(input_ids).to(device)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits.float().cpu().numpy()
        prompt = ids[:1]
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1
        )
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype),
        "keys": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])),
        "shape": list(found.shape),
        "difference": float(np.abs(found - logits).max()) if found.shape == logits.shape else None,
        "largest": float(np.abs(logits).max()),
        "generated": int(generated.shape[1] - prompt.shape[1]),
    }


if __name__ == "__main__":
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as given:
        answer = compare(str(given["directory"]), str(given["device"]), given["input_ids"], given["logits"])
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
