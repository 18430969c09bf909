"""The models whose shapes are measured, by name: what a loss over their vocabulary costs depends on nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """From the model's published ``config.json``; `parameters` counts tied embeddings once and every expert."""

    model: str  # its repository on the Hugging Face hub, which is the source
    vocab: int  # rows of lm_head: padded, so what the logits have
    hidden: int
    layers: int
    parameters: int
    tied: bool  # lm_head is the embedding

    @property
    def source(self) -> str:
        return f"https://huggingface.co/{self.model}/blob/main/config.json"


SHAPES = {
    "smollm2-135m": ModelShape("HuggingFaceTB/SmolLM2-135M", 49152, 576, 30, 134_515_008, True),
    "smollm2-360m": ModelShape("HuggingFaceTB/SmolLM2-360M", 49152, 960, 32, 361_821_120, True),
    "smollm2-1.7b": ModelShape("HuggingFaceTB/SmolLM2-1.7B", 49152, 2048, 24, 1_711_376_384, True),
    "llama3.2-1b": ModelShape("meta-llama/Llama-3.2-1B", 128256, 2048, 16, 1_235_814_400, True),
    "llama3.2-3b": ModelShape("meta-llama/Llama-3.2-3B", 128256, 3072, 28, 3_212_749_824, True),
    "llama3.1-8b": ModelShape("meta-llama/Llama-3.1-8B", 128256, 4096, 32, 8_030_261_248, False),
    "qwen2.5-0.5b": ModelShape("Qwen/Qwen2.5-0.5B", 151936, 896, 24, 494_032_768, True),
    "qwen2.5-1.5b": ModelShape("Qwen/Qwen2.5-1.5B", 151936, 1536, 28, 1_543_714_304, True),
    "qwen2.5-7b": ModelShape("Qwen/Qwen2.5-7B", 152064, 3584, 28, 7_615_616_512, False),
    "qwen3-0.6b": ModelShape("Qwen/Qwen3-0.6B", 151936, 1024, 28, 596_049_920, True),
    "qwen3-1.7b": ModelShape("Qwen/Qwen3-1.7B", 151936, 2048, 28, 1_720_574_976, True),
    "qwen3-4b": ModelShape("Qwen/Qwen3-4B", 151936, 2560, 36, 4_022_468_096, True),
    "qwen3-8b": ModelShape("Qwen/Qwen3-8B", 151936, 4096, 36, 8_190_735_360, False),
    "gemma3-1b": ModelShape("google/gemma-3-1b-pt", 262144, 1152, 26, 999_885_952, True),
    "gpt-oss-20b": ModelShape("openai/gpt-oss-20b", 201088, 2880, 24, 20_914_757_184, False),
}


def shape_named(name: str) -> ModelShape:
    """Raises ValueError with the names there are."""
    try:
        return SHAPES[name.lower()]
    except KeyError:
        raise ValueError(f"model {name!r} is not known; choose from {', '.join(SHAPES)}") from None
