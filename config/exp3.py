# Question: what does capacity buy at equal data?
# Changed: d_model 16 -> 128, 4 layers, 8 heads: 7,342,033 parameters; less dropout, a higher learning rate.
# Documents: validation perplexity 65.71 (best at epoch 10 of 20), 6 hours; readable sentences.
data = "data/wikitext103"
vocab_size = 50257
max_seq_len = 512
d_model = 128
n_layers = 4
n_heads = 8
d_ff = 512
dropout = 0.1
flash = False

batch_size = 32
epochs = 20
lr = 6e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
