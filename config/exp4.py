# Question: what does width buy?
# Changed: d_model 128 -> 256: 16,206,673 parameters; lr 4e-4.
# Documents: validation perplexity 46.33 (stopped at epoch 9 of 15), 7 hours; topics still drift.
from config.exp3 import *

d_model = 256
d_ff = 1024
epochs = 15
lr = 4e-4
