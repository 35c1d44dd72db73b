# Question: how far does flash attention stretch the same GPU?
# Changed: flash attention (the same mathematics, O(T) memory), d_model 512, 12 layers: 63,873,617 parameters.
# Documents: validation perplexity 28.05 after 16 epochs, 20 hours, 12 GB; GPT-2 small is quoted at about 29.
data = "data/wikitext103"
vocab_size = 50257
max_seq_len = 512
d_model = 512
n_layers = 12
n_heads = 8
d_ff = 2048
dropout = 0.1
flash = True

batch_size = 16
epochs = 16
lr = 4e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
