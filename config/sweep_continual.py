# Question: what keeps a model from forgetting its old text: replay, a lower rate, LoRA, text it wrote itself?
#   python sample.py out/demo --write=data/self --write_tokens=60e3 --temperature=1 --top_k=0
#   python sweep.py config/sweep_continual.py      # after the first two commands of config/continual.py
# The arm without changes is plain continued training. table.md says what each arm forgets beside its loss on
# the new text; against.png draws one against the other.
from config.continual import *

arm = ("replay=0.01", "replay=0.05", "replay=0.2", "lr=1e-3", "lora_rank=16",
       "replay=0.05 replay_data=data/self")
metric = "shakespeare_forgotten"
against = "loss"
seeds = 3
