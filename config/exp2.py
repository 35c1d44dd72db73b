# Question: does the same tiny model get better with 50 times the data?
# Changed: WikiText-103 (116M tokens) instead of WikiText-2; batch 32; 10 epochs.
# Documents: validation perplexity 364.71 after 10 epochs, 2.5 hours; still gibberish: capacity is the limit.
#   python prepare_data.py wikitext103 && python train.py config/exp2.py
data = "data/wikitext103"
vocab_size = 50257
max_seq_len = 512
d_model = 16
n_layers = 2
n_heads = 2
d_ff = 64
dropout = 0.3
flash = False

batch_size = 32
epochs = 10
lr = 3e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
