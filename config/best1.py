# Question: how low can exp 1's 869,153 parameters get on WikiText-2 in ten minutes on two CPU cores?
# Changed: a trunk of width 64 behind a factorised embedding of rank 14 in place of width 16; RoPE, SwiGLU,
# Muon, no dropout; the loss's softmax is over 2,048 sampled tokens of 50,257, so a step costs a fraction.
#   python prepare_data.py wikitext2 && python train.py config/best1.py
data = "data/wikitext2"
vocab_size = 50257
max_seq_len = 256
d_model = 64
embed_rank = 14
n_layers = 3
n_heads = 2
d_ff = 199
activation = "swiglu"
bias = False
head_bias = False
pos = "rope"
qk_norm = True
zero_init = True

batch_size = 16
epochs = 0
train_minutes = 10
head_samples = 2048
optimizer = "muon"
muon_lr = 0.02
muon_warmup_steps = 100
lr = 2e-3
embed_lr = 3e-2
weight_decay = 0.0
schedule = "wsd"
warmup_steps = 50
decay_fraction = 0.4
min_lr_ratio = 0.0
eval_interval = 3000
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
