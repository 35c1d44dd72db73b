# Question: what does capacity buy at equal data?
# Changed: d_model 16 -> 64, 4 layers, 8 heads.
# Documents (exp 3, at WikiText scale): 82 % lower perplexity: gibberish turns into sentences.
data = "data/shakespeare"
max_seq_len = 128
d_model = 64
n_layers = 4
n_heads = 8
d_ff = 256
flash = False

batch_size = 16
epochs = 0
max_steps = 1000
lr = 4e-3
schedule = "linear"
warmup_steps = 50
min_lr_ratio = 0.0
eval_interval = 100
patience = 5
prompts = ("ROMEO.", "To be, or not to be,", "The king")
