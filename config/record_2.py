# Question: how low can the validation loss get in ten minutes on two CPU cores?
# Changed: of record 1, the softmax is over 1,024 sampled tokens of 8,192; twice the learning rate for
# embeddings; LayerNorm, which is faster than RMSNorm on a CPU. RESULTS.md has the losses.
#   python prepare_data.py shakespeare --tokenizer=bpe:8192 --name=shakespeare_bpe8192
#   python train.py config/record_2.py
from config.record_1 import *

norm = "layernorm"
head_samples = 1024
embed_lr = 2e-2
