# Question: which parts of the speedrun's recipe earn their place at equal training time?
#   python prepare_data.py shakespeare --tokenizer=bpe:8192 --name=shakespeare_bpe8192
#   python prepare_data.py gutenberg --tokenizer=bpe:8192 --max_tokens=20e6
#   python sweep.py config/recipe.py --dry_run                 # 192 runs of eight minutes: 13 hours
# RESULTS.md has the command and the table of a part of it, runs of 75 seconds.
# Base: config/speedrun.py. Each arm takes one part away or tries one more. Shakespeare is read several times,
# the other text once; twice the width is the second size. Results in out/recipe_sweep/table.md.
from config.speedrun import *

script = "train"
equal_seconds = 480  # 1,000 steps or more on one core
jobs = 2
metric = "bits_per_byte"
eval_interval = 10000
prompts = ()
setting = ("data=data/gutenberg", "d_model=256 n_heads=4 d_ff=768",
           "data=data/gutenberg d_model=256 n_heads=4 d_ff=768")
arm = ("tie_embeddings=true embed_lr=2e-2 head_lr=0", "head_samples=0", "beta1=0.9", "beta2=0.95",
       "decay_fraction=0.4", "muon_momentum=0.95", "muon_lr=0.012", "optimizer=adamw lr=4e-3", "n_layers=4",
       "norm=rmsnorm", "qk_norm=false", "zero_init=false", "batch_size=4", "dropout=0.1", "weight_decay=0.1")
