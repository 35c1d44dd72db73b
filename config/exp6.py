# Question: how far does flash attention stretch the same GPU?
# Changed: flash attention (the same mathematics, O(T) memory), d_model 512, 12 layers: 63,873,617 parameters.
# Documents: validation perplexity 28.05 after 16 epochs, 20 hours, 12 GB; GPT-2 small is quoted at about 29.
from config.exp5 import *

flash = True
d_model = 512
n_layers = 12
d_ff = 2048
epochs = 16
