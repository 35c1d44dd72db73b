# Question: are rotary positions better than learned ones?
# Changed: RoPE instead of the position table; also evaluated at other context lengths.
# Documents (exp 7, at WikiText scale): equal perplexity in half the epochs, and no length limit.
data = "data/shakespeare"
max_seq_len = 128
d_model = 160
n_layers = 10
n_heads = 8
d_ff = 640
flash = True
pos = "rope"

batch_size = 16
epochs = 0
max_steps = 1000
lr = 2e-3
schedule = "linear"
warmup_steps = 50
min_lr_ratio = 0.0
eval_interval = 100
eval_lens = (64, 256, 512)
patience = 5
prompts = ("ROMEO.", "To be, or not to be,", "The king")
