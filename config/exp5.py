# Question: what does depth buy at equal width?
# Changed: 4 -> 8 layers: 19,365,713 parameters; batch 16.
# Documents: validation perplexity 38.21 after 20 epochs, 17 hours; depth helps coherence more than width did.
data = "data/wikitext103"
vocab_size = 50257
max_seq_len = 512
d_model = 256
n_layers = 8
n_heads = 8
d_ff = 1024
dropout = 0.1
flash = False

batch_size = 16
epochs = 20
lr = 4e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
