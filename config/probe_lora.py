# Question: does LoRA, or training only the embeddings of a fact's tokens, forget less than full training?
#   python memory_probe.py config/probe_lora.py
#   python memory_probe.py config/probe_lora.py --base=out/qwen --data=data/notes --name=qwen_lora
# The second is about an imported model, on text in its tokens (prepare_data.py --tokenizer_from=out/qwen).
# A method that learns less forgets less, so read what is kept beside what was learned; each has two rates.
d_model = 64
pool = 128
base_lr = 3e-3
steps = 200
chaos_seeds = 0
arm = ["lora_rank=8 lr=3e-3", "lora_rank=8 lr=1e-2", "method=rows", "method=rows lr=1e-2"]
