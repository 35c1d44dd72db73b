# Question: what is lost if the update reads the token alone, so that all positions are trained at once?
# Changed: context_update scan, in 4 layers, each with a feed-forward. 2,734,792 parameters.
from config.newllm_baseline import *

context_update = "scan"
n_layers = 4
d_ff = 568
activation = "gelu"
