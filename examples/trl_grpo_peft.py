"""GRPO with TRL and LoRA, on the lm_head too, which TRL's own trainer refuses.

    python examples/trl_grpo_peft.py                             # a tiny random model, no network
    python examples/trl_grpo_peft.py --model Qwen/Qwen3-0.6B --steps 100

Needs `pip install trl==1.16.0 peft`.
"""

from peft import LoraConfig
from trl_grpo import PROMPTS, arguments, config, digits, policy

from grpo_kernels.integrations.trl import GRPOKernelsTrainer

if __name__ == "__main__":
    chosen = arguments()
    model, tokenizer = policy(chosen.model)
    trainer = GRPOKernelsTrainer(
        model,
        reward_funcs=digits,
        args=config(chosen.steps, beta=0.02),  # the reference is the model without its adapter
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"]),
    )
    trainer.train()
    print(trainer.step_counts)
