# Question: can a language model work without attention, with a memory of fixed size?
# Documents: validation perplexity 23.34 (epoch 27 of 50) on WikiText-2 with the 1,000 most frequent words and
# one <unk> for all others, so it does not compare with perplexities of other vocabularies.
#   python prepare_data.py wikitext2 --tokenizer=words:1000 --name=wikitext2_words1000
#   python train.py config/newllm_baseline.py
#   python train.py config/newllm_baseline.py --dtype=fp16 --max_minutes=85  # Colab; repeat it to resume
# 2,739,432 parameters. newllm_scan, newllm_lstm and newllm_transformer are of equal size.
data = "data/wikitext2_words1000"
vocab_size = 1000
max_seq_len = 64
mixer = "context"  # context_update is gated: the documents' equations
d_model = 256
d_ff = 512
context_dim = 256
n_layers = 6
activation = "relu"
pos = "none"
tie_embeddings = False
dropout = 0.1

batch_size = 32
epochs = 50
patience = 15
lr = 1e-4
schedule = "constant"
weight_decay = 0  # Adam, as in the documents
beta2 = 0.999
grad_clip = 1.0
prompts = ("The", "In the", "He was")
