# A transformer the size of newllm_baseline: 4 layers, RoPE. 2,736,840 parameters.
from config.newllm_baseline import *

mixer = "attention"
context_dim = 0
n_layers = 4
n_heads = 4
d_ff = 568
activation = "gelu"
pos = "rope"
