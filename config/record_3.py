# Question: how low can the validation loss get in ten minutes on two CPU cores?
# Changed: of record 2, embedding and head have tables of their own, with rates that suit them; beta2 is
# larger, the decay twice as long. The run takes ten minutes on any machine. RESULTS.md has the losses.
#   python prepare_data.py shakespeare --tokenizer=bpe:8192 --name=shakespeare_bpe8192
#   python train.py config/record_3.py                               # or, for less time:  --train_minutes=2
from config.record_2 import *

max_steps = 0
train_minutes = 10
tie_embeddings = False
embed_lr = 6e-2
head_lr = 1e-2
beta2 = 0.99
decay_fraction = 0.8
