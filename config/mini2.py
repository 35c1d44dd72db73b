# Question: does the same tiny model get better with all of the text?
# Changed: all training tokens instead of 50,000.
# Documents (exp 2, at WikiText scale): 21 % lower perplexity; capacity is the limit now.
data = "data/shakespeare"
max_seq_len = 128
d_model = 16
n_layers = 2
n_heads = 2
d_ff = 64
flash = False

batch_size = 16
epochs = 0
max_steps = 1000
lr = 1e-2
schedule = "linear"
warmup_steps = 50
min_lr_ratio = 0.0
eval_interval = 100
patience = 5
prompts = ("ROMEO.", "To be, or not to be,", "The king")
