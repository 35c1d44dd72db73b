# Question: what does a tiny model learn from very little text?
# Changed: nothing yet, the first rung: 78,272 parameters on the first 50,000 tokens of Shakespeare.
# Documents (exp 1, at WikiText scale): data starvation, the worst rung of the ladder.
#   python prepare_data.py shakespeare && python train.py config/mini1.py
# The mini ladder asks the questions of exp 1-7 on a laptop. Every rung trains on 2.0M tokens (1.4 epochs of
# the whole text), so only data, size and architecture differ; no dropout, a learning rate to suit the width.
data = "data/shakespeare"
train_tokens = 50_000
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
