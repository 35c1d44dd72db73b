# Question: what does capacity buy at equal data?
# Changed: d_model 16 -> 128, 4 layers, 8 heads: 7,342,033 parameters; less dropout, a higher learning rate.
# Documents: validation perplexity 65.71 (best at epoch 10 of 20), 6 hours; readable sentences.
from config.exp2 import *

d_model = 128
n_layers = 4
n_heads = 8
d_ff = 512
dropout = 0.1
epochs = 20
lr = 6e-4
