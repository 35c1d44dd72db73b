# Question: what does a larger model buy, with flash attention to pay for it?
# Changed: flash attention, d_model 160, 10 layers.
# Documents (exp 6, at WikiText scale): 27 % lower perplexity.
data = "data/shakespeare"
max_seq_len = 128
d_model = 160
n_layers = 10
n_heads = 8
d_ff = 640
flash = True

batch_size = 16
epochs = 0
max_steps = 1000
lr = 2e-3
schedule = "linear"
warmup_steps = 50
min_lr_ratio = 0.0
eval_interval = 100
patience = 5
prompts = ("ROMEO.", "To be, or not to be,", "The king")
