# Question: how low can exp 3's 7,342,033 parameters get on WikiText-2 in an hour on two CPU cores?
# Changed: RoPE, SwiGLU and Muon in exp 3's shape; the softmax over 2,048 sampled tokens (config/best1.py).
#   python prepare_data.py wikitext2 && python train.py config/best3.py
from config.best1 import *

d_model = 128
embed_rank = 0
n_layers = 4
d_ff = 420
dropout = 0.1
embed_lr = 1e-2
train_minutes = 60
