# Question: what is lost if the update reads the token alone, so that all positions are trained at once?
# Changed: context_update scan, in 4 layers, each with a feed-forward. 2,735,304 parameters.
from config.newllm_baseline import *

context_update = "scan"
n_layers = 4
d_ff = 696
activation = "gelu"
