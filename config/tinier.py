# Question: what is the best model per parameter? The base that the kit's parts are compared with.
#   python prepare_data.py gutenberg --tokenizer=bpe:8192 --max_tokens=500e6
#   torchrun --standalone --nproc_per_node=2 train.py config/tinier.py
#   python train.py config/tinier.py --data=data/shakespeare_bpe8192 --max_steps=500      # on a laptop
# 4,894,272 parameters, 3,321,408 without embeddings. The head is tied, so its learning rate is embed_lr.
# The notes used 0.02 as a factor on lr, at which the matrices hardly move; here it is Muon's own learning
# rate, as published (RESULTS.md compares the two).
data = "data/gutenberg"
max_seq_len = 512
d_model = 192
n_layers = 9
n_heads = 3
d_ff = 384
activation = "swiglu"
norm = "layernorm"
bias = False
head_bias = False
pos = "rope"
qk_norm = True
window = 256
global_every = 2
zero_init = True

batch_size = 16
epochs = 1
optimizer = "muon"
muon_lr = 0.02
lr = 5e-4
embed_lr = 5e-3
scalar_lr = 5e-4
schedule = "cosine"
warmup_steps = 100
eval_interval = 1000
prompts = ("The history of", "Once upon a time", "She looked at him and")
