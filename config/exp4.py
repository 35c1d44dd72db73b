# Question: what does width buy?
# Changed: d_model 128 -> 256: 16,206,673 parameters; lr 4e-4.
# Documents: validation perplexity 46.33 (stopped at epoch 9 of 15), 7 hours; topics still drift.
data = "data/wikitext103"
vocab_size = 50257
max_seq_len = 512
d_model = 256
n_layers = 4
n_heads = 8
d_ff = 1024
dropout = 0.1
flash = False

batch_size = 32
epochs = 15
lr = 4e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
