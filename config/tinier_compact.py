# Question: how far can reuse go? The notes' combined proposal.
# Changed: 3 blocks used 3 times with adapters, all their matrices of rank 32, one pool of 4 feed-forward
# experts for all layers, embeddings factorised as 64 -> 192.
#   python train.py config/tinier_compact.py --dry_run
# 962,624 parameters, 438,336 without embeddings.
from config.tinier import *

n_unique_blocks = 3
adapter_rank = 32
proj_rank = 32
n_experts = 4
embed_rank = 64
