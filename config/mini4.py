# Question: what does width buy?
# Changed: d_model 64 -> 128.
# Documents (exp 4, at WikiText scale): 30 % lower perplexity.
data = "data/shakespeare"
max_seq_len = 128
d_model = 128
n_layers = 4
n_heads = 8
d_ff = 512
flash = False

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
