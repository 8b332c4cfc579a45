"""ICAE: a model with LoRA writes a context into memory slots, the same model without it reads them. arXiv:2307.06945.

coder = ICAE(model, slots=128)                            # needs peft: pip install 'fewer[lora]'
Trainer(coder, args, train_dataset=texts).train()         # its forward gives the loss
summary = coder.summary(ids, mask, task="prompt")
coder.model.generate(**summary.inputs(question, mask))    # the adapters are off
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.compat import pretrained

from .placing import Placing
from .summary import Summary, SummaryError

Task = Literal["repeat", "continue", "prompt"]
TASKS: tuple[Task, ...] = ("repeat", "continue", "prompt")
FILE = "icae.safetensors"
SETTINGS = ("slots", "rate", "repeats", "enough", "silent")
IGNORED = -100


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("ICAE needs peft for its LoRA encoder: pip install 'fewer[lora]'") from error
    return peft


class ICAE(nn.Module):
    """An encoder and a decoder in one causal LM of transformers.

    slots     M, memory embeddings of a segment. rate: tokens of a segment for each slot, at most
    r, alpha, dropout, targets   of LoRA; targets are names of linear layers
    repeats   share of the training texts that are to be repeated from memory; the others are continued
    enough    tokens that must be left to continue, else the text is repeated. silent: first ones that teach nothing
    eos       id of the token that ends a repetition; None = the config's

    The model gets adapters put into its layers, and its own weights are frozen. `model` has them off between calls, so
    that it writes what it wrote before. Trained: LoRA, the memory embeddings, one embedding for each task.
    Source   arXiv:2307.06945, sec. 2, and the code of its second version.
    """

    accepts_loss_kwargs = True

    def __init__(
        self, model: nn.Module, slots: int = 128, *, rate: int = 4, r: int = 128, alpha: int = 32,
        dropout: float = 0.05, targets: Sequence[str] | None = ("q_proj", "v_proj"), repeats: float = 0.5,
        enough: int = 64, silent: int = 8, eos: int | None = None, adapters: str | Path | None = None,
    ) -> None:  # fmt: skip
        """adapters: a folder of PEFT's, instead of fresh ones."""
        super().__init__()
        if slots < 1 or rate < 1 or not 0 <= repeats <= 1 or silent < 0 or enough <= silent:
            raise SummaryError(
                f"slots={slots}, rate={rate}, repeats={repeats}, enough={enough}, silent={silent}: needs 1 or more "
                "slots and tokens for each, a share in [0, 1], and more tokens to continue than are silent"
            )
        peft = _peft()
        if Placing.of(model).learned:
            raise SummaryError(f"{type(model).__name__} adds learned positions; memory takes those of rotary models")
        self.slots, self.rate, self.repeats, self.enough, self.silent = slots, rate, repeats, enough, silent
        if adapters is None:
            config = peft.LoraConfig(
                r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets) if targets else None,
                task_type="CAUSAL_LM",
            )  # fmt: skip
            self.encoder = peft.get_peft_model(model, config)
        else:
            self.encoder = peft.PeftModel.from_pretrained(model, adapters, is_trainable=True)
        end = pretrained(model).config.eos_token_id if eos is None else eos
        self.eos = cast(int, end[0] if isinstance(end, list) else end)
        if self.eos is None:
            raise SummaryError("the config names no eos token, and repetitions need an end: give eos=")
        table = cast(nn.Embedding, pretrained(model).get_input_embeddings()).weight.detach().float()
        spread = table.std(0)
        self.memory = nn.Parameter(table.mean(0) + spread * torch.randn(slots, len(spread)).to(table))
        self.tasks = nn.Parameter(table.mean(0) + spread * torch.randn(len(TASKS), len(spread)).to(table))
        self._off()

    @property
    def model(self) -> nn.Module:
        """The decoder: the model that was given, adapters off."""
        return self.encoder.base_model.model

    def _off(self) -> None:
        """Adapters off, and those still learnable: PEFT freezes what it turns off."""
        self.encoder.base_model.disable_adapter_layers()
        for name, p in self.encoder.named_parameters():
            p.requires_grad_("lora_" in name)

    def _encoded(self, x: Tensor, seen: Tensor, at: Tensor) -> Tensor:
        """The last states with the adapters on, (B, N, C)."""
        self.encoder.base_model.enable_adapter_layers()
        try:
            inner = pretrained(self.model).base_model
            return inner(inputs_embeds=x, attention_mask=seen, position_ids=at, use_cache=False).last_hidden_state
        finally:
            self._off()

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Contexts as memory, (B, M * segments, C), and which slots there are, (B, M * segments) bool.

        ids, mask   (B, N); the mask is 0 at padding. More than M * rate tokens are parted into segments of equal
                    length, each read alone; one that is padding alone leaves no slots
        """
        if not ids.shape[1]:
            raise SummaryError("there is nothing to encode: ids is empty")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        count = math.ceil(ids.shape[1] / (self.slots * self.rate))
        length = math.ceil(ids.shape[1] / count)
        found, valid = [], []
        for part, seen in zip(ids.split(length, 1), mask.split(length, 1), strict=True):
            text = self._embed(part)
            slots = self.memory.to(text).expand(len(ids), -1, -1)
            whole = torch.cat([seen, seen.new_ones(slots.shape[:2])], 1)
            states = self._encoded(torch.cat([text, slots], 1), whole, (whole.cumsum(1) - 1).clamp(min=0))
            found.append(states[:, -self.slots :])
            valid.append(seen.any(1, keepdim=True).expand(-1, self.slots))
        return torch.cat(found, 1), torch.cat(valid, 1)

    @torch.no_grad()
    def summary(self, ids: Tensor, mask: Tensor | None = None, *, task: Task = "prompt") -> Summary:
        """Contexts as memory with the embedding of a task behind it, which `model` goes on from.

        task   "repeat": write the context again. "continue": write what follows it. "prompt": read a prompt, and answer
        """
        return self._summary(*self.encode(ids, mask), task)

    def _summary(self, memory: Tensor, valid: Tensor, task: Task) -> Summary:
        if task not in TASKS:
            raise SummaryError(f"task={task!r} is none of {', '.join(TASKS)}")
        ask = self.tasks[TASKS.index(task)].to(memory).expand(len(memory), 1, -1)
        valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
        return Summary(self.model, valid, valid.sum(1), torch.cat([memory, ask], 1))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        task: Task | None = None, prompt: Tensor | None = None, num_items_in_batch: Any = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss of one batch, all of one task: mean cross entropy over the target tokens.

        input_ids  (B, N) long, texts; attention_mask: 0 at padding, on the right
        task       None: drawn, "repeat" with the share `repeats`. "repeat": the target is the text and its end.
                   "continue": the first half is encoded, the target is the second, but for its `silent` first tokens.
                   "prompt": `prompt` is (B, P), and the target its `labels`, -100 where nothing is taught
        labels     for "prompt" alone; otherwise the text is its own target

        Returns   `loss` and `logits`, (B, T, V), those before each of the T target tokens.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise SummaryError("texts are padded on the left, and targets stand right behind the memory: pad right")
        left = input_ids.shape[1] - input_ids.shape[1] // 2
        if task is None:
            task = "repeat" if left < self.enough or float(torch.rand(())) < self.repeats else "continue"
        if task == "prompt":
            if prompt is None or labels is None or labels.shape != prompt.shape:
                raise SummaryError("task='prompt' needs `prompt` and its `labels`, both (B, P)")
            context, seen, target, taught = input_ids, mask, prompt, labels
        elif task == "repeat":
            ends = torch.cat([mask, mask.new_zeros(len(mask), 1)], 1)
            at = mask.sum(1, keepdim=True)
            target = torch.cat([input_ids, input_ids.new_zeros(len(mask), 1)], 1).scatter(1, at, self.eos)
            context, seen, taught = input_ids, mask, target.masked_fill(ends.scatter(1, at, 1) == 0, IGNORED)
        else:
            cut = input_ids.shape[1] // 2
            if left <= self.silent or not cut:
                raise SummaryError(
                    f"{left} tokens are left to continue, of which the first {self.silent} teach nothing"
                )
            context, seen, target = input_ids[:, :cut], mask[:, :cut], input_ids[:, cut:]
            taught = target.masked_fill(mask[:, cut:] == 0, IGNORED)
            taught = torch.cat([torch.full_like(taught[:, : self.silent], IGNORED), taught[:, self.silent :]], 1)
        before = self._summary(*self.encode(context, seen), task)
        logits = self.model(**before.given(target)).logits[:, -target.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), taught.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (taught != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / count, "logits": logits}

    def _embed(self, ids: Tensor) -> Tensor:
        return pretrained(self.model).get_input_embeddings()(ids)

    def save(self, folder: str | Path) -> None:
        """Adapters as PEFT saves them, and what else was trained; not the model."""
        from safetensors.torch import save_file

        self.encoder.save_pretrained(folder)
        about = {name: json.dumps(getattr(self, name)) for name in (*SETTINGS, "eos")}
        trained = {"memory": self.memory, "tasks": self.tasks}
        save_file({k: v.detach().cpu().contiguous() for k, v in trained.items()}, Path(folder) / FILE, about)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> ICAE:
        """What `save` wrote, on the model it was trained on."""
        from safetensors import safe_open

        with safe_open(Path(folder) / FILE, "pt") as file:
            about = {name: json.loads(file.metadata()[name]) for name in (*SETTINGS, "eos")}
            memory, tasks = file.get_tensor("memory"), file.get_tensor("tasks")
        made = cls(model, **about, adapters=folder)
        made.memory.data.copy_(memory)
        made.tasks.data.copy_(tasks)
        return made
