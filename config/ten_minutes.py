# Question: how low can the validation loss get in ten minutes on two CPU cores?
# Changed: of the speedrun, wider, since ten minutes leave time for it. RESULTS.md has the losses.
#   python prepare_data.py shakespeare --tokenizer=bpe:8192 --name=shakespeare_bpe8192
#   python train.py config/ten_minutes.py --dropout=0.1              # or, for less time:  --train_minutes=2
from config.speedrun import *

max_steps = 0
train_minutes = 10
d_model = 192
n_heads = 3
d_ff = 576
eval_interval = 1000
