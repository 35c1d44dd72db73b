# Question: how low can the validation loss get in ten minutes on two CPU cores?
# Changed: of record 2, embedding and head have tables of their own, with the learning rates that then suit them;
# a slower second moment for Adam, and a longer decay. RESULTS.md has every record and what was rejected.
#   python prepare_data.py shakespeare --tokenizer=bpe:8192 --name=shakespeare_bpe8192
#   python train.py config/speedrun.py                   # or, for less time:  --max_steps=600
from config.record_2 import *

tie_embeddings = False
embed_lr = 6e-2
head_lr = 1e-2
beta2 = 0.99
decay_fraction = 0.8
