# Question: does a wider context in a deeper loop help?
# Changed: context 512, not 256; 12 layers, not 6; batches of 512. 4,840,936 parameters. Documents: validation
# perplexity 36.45 (epoch 50, still falling): the larger model was worse.
from config.newllm_baseline import *

context_dim = 512
n_layers = 12
batch_size = 512
