# A first success: a small model of Shakespeare in a minute or two on two CPU cores, in seconds on a GPU.
#   make demo, or:  python prepare_data.py shakespeare && python train.py config/demo.py
data = "data/shakespeare"
max_seq_len = 128
d_model = 128
n_layers = 4
n_heads = 4
pos = "rope"
activation = "swiglu"
d_ff = 384
norm = "rmsnorm"
bias = False
head_bias = False

batch_size = 16
epochs = 0
max_steps = 1000
lr = 3e-3
warmup_steps = 50
min_lr_ratio = 0.0
eval_interval = 200
prompts = ("ROMEO.", "To be, or not to be,", "The king")
