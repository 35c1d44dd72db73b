# An LSTM the size of newllm_baseline: 2 layers, each with a feed-forward. 2,740,696 parameters.
from config.newllm_baseline import *

mixer = "lstm"
n_layers = 2
d_ff = 1016
activation = "gelu"
context_dim = 256
