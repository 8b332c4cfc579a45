"""The other side of `kv_speed.py --kvpress`: kvpress's own presses, timed in an environment of their own.

Run by that script, not by hand. It gets a file with the configuration, the weights and the prompt, then one JSON
request a line, {"method", "keep", "steps"}, and answers each with seconds to read and write, bytes, and the file that
holds the positions each layer has kept.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext

import torch
from kvpress import ExpectedAttentionPress, KnormPress, SnapKVPress
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PRESSES = {
    "snapkv": lambda gone: SnapKVPress(gone, window_size=64, kernel_size=5),
    "expected_attention": ExpectedAttentionPress,
    "knorm": KnormPress,
}


def positions(kept: Tensor, full: Tensor) -> Tensor:
    """(G, M) ascending: which rows of the full keys (1, G, S, d) those of the kept ones (1, G, M, d) are."""
    rows = [{row.numpy().tobytes(): i for i, row in enumerate(head)} for head in full[0]]
    return torch.tensor([sorted(r[x.numpy().tobytes()] for x in head) for r, head in zip(rows, kept[0], strict=True)])


@torch.no_grad()
def main(given: str, answers: str) -> None:
    torch.set_num_threads(1)
    start = torch.load(given)
    model = LlamaForCausalLM(LlamaConfig(**start["config"])).eval()
    model.load_state_dict(start["weights"])
    ids = start["ids"]
    whole = DynamicCache()
    model(ids, past_key_values=whole, logits_to_keep=1)
    full = [layer.keys for layer in whole.layers]
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        press = PRESSES[asked["method"]](1 - asked["keep"]) if asked["method"] else None
        cache = DynamicCache()
        with nullcontext() if press is None else press(model):
            began = time.thread_time()
            token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            read = time.thread_time() - began
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        if press is not None and asked.get("kept"):
            torch.save([positions(a.keys, b) for a, b in zip(cache.layers, full, strict=True)], answers)
        for step in range(asked["steps"] + 1):
            if step == 1:  # the first step pays for new shapes
                began = time.thread_time()
            place = torch.tensor([ids.shape[1] + step])
            token = model(
                token, past_key_values=cache, position_ids=place[None], cache_position=place
            ).logits.argmax(-1)  # fmt: skip
        print(json.dumps({"read": read, "write": time.thread_time() - began, "bytes": held}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
