# Question: are rotary positions better than learned ones?
# Changed: RoPE instead of the position table: 63,611,473 parameters, no length limit; 8 epochs.
# Documents: validation perplexity 28.06 after 8 epochs: that of exp 6 in half the time.
data = "data/wikitext103"
vocab_size = 50257
max_seq_len = 512
d_model = 512
n_layers = 12
n_heads = 8
d_ff = 2048
dropout = 0.1
flash = True
pos = "rope"

batch_size = 16
epochs = 8
lr = 4e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
eval_lens = (256, 512, 1024)
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
