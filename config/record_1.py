# Question: how low can the validation loss get in ten minutes on two CPU cores?
# The first record, of 2026-11-22: narrow and shallow, since few tokens fit into ten minutes;
# Muon; twice AdamW's usual learning rate, more for embeddings; a long decay. RESULTS.md has the losses.
#   python prepare_data.py shakespeare --tokenizer=bpe:8192 --name=shakespeare_bpe8192
#   python train.py config/record_1.py
data = "data/shakespeare_bpe8192"
max_seq_len = 256
d_model = 128
n_layers = 4
n_heads = 2
d_ff = 384
activation = "swiglu"
norm = "rmsnorm"
bias = False
head_bias = False
pos = "rope"
qk_norm = True
zero_init = True

batch_size = 8
epochs = 0
max_steps = 5500
optimizer = "muon"
muon_lr = 0.02
muon_warmup_steps = 100
lr = 2e-3
embed_lr = 1e-2
weight_decay = 0.0
schedule = "wsd"
warmup_steps = 50
decay_fraction = 0.4
min_lr_ratio = 0.0
eval_interval = 250
prompts = ("To be, or not to be,", "The king", "She looked at him and")
