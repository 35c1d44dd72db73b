# Question: what does a model of Chinchilla-like size learn from WikiText-2 (2.4M tokens)?
# Changed: nothing yet, the first rung: 869,153 parameters, most of them embeddings.
# Documents: validation perplexity 464.64 at epoch 209 of 300.
#   python prepare_data.py wikitext2 && python train.py config/exp1.py
data = "data/wikitext2"
vocab_size = 50257
max_seq_len = 512
d_model = 16
n_layers = 2
n_heads = 2
d_ff = 64
dropout = 0.3
flash = False

batch_size = 8
epochs = 300
lr = 3e-4
schedule = "constant"
beta2 = 0.999
weight_decay = 0.1
grad_clip = 1.0
patience = 5
prompts = ("The history of India is", "In mathematics,", "The cat sat on the", "Artificial intelligence can",
           "The capital of France is")
