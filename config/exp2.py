# Question: does the same tiny model get better with 50 times the data?
# Changed: WikiText-103 (116M tokens) instead of WikiText-2; batch 32; 10 epochs.
# Documents: validation perplexity 364.71 after 10 epochs, 2.5 hours; still gibberish: capacity is the limit.
#   python prepare_data.py wikitext103 && python train.py config/exp2.py
from config.exp1 import *

data = "data/wikitext103"
batch_size = 32
epochs = 10
