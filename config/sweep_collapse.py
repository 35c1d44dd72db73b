# Question: what makes a distilled student write ",,,,", and what does not? (MEMORY 7.4's arms)
#   python sweep.py config/sweep_collapse.py --max_steps=100 --lr=1e-2 --name=collapse_short
#   python sweep.py config/sweep_collapse.py     # ten times as long; both after config/distill_teacher.py's
# Examples are lines of text, one to a row, as in exp 9. Base: the soft loss alone, KL at temperature 1.
# KL with swapped arguments is reverse_kl. batchmean on (B, T, V) multiplies the soft loss by the tokens of
# a row: beside cross-entropy that is alpha=0.97 (32:1). Collapsed: modal_share above 0.5.
from config.sweep_distill import *

script = "distill"
alpha = 1.0
examples = "lines"
max_seq_len = 32
batch_size = 16
eval_interval = 250
arm = ("alpha=0", "alpha=0.5 temperature=2", "temperature=4", "divergence=reverse_kl", "divergence=jsd",
       "divergence=skew_kl", "divergence=tv", "count_padding", "alpha=0.97 grad_clip=0")
metric = "modal_share"
against = "loss"
also = ("distinct_2", "repetition_4", "entropy", "to_unigram", "agreement")
seeds = 3
