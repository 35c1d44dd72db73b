# Question: what makes a distilled student write ",,,,", and what does not? (MEMORY 7.4's arms)
#   python sweep.py config/sweep_collapse.py --max_steps=100 --name=collapse_short
#   python sweep.py config/sweep_collapse.py     # ten times as long; both after config/distill_teacher.py's
# Base: the soft loss alone, KL at temperature 1. KL with swapped arguments is reverse_kl. batchmean on (B, T,
# V) multiplies the soft loss by the tokens of a row: beside cross-entropy that is alpha=0.985 (64:1); alone
# it does nothing, since Adam ignores the gradient's scale. Collapsed: modal_share above 0.5.
from config.sweep_distill import *

script = "distill"
without_teacher = "no"
alpha = 1.0
arm = ("alpha=0", "alpha=0.5 temperature=2", "temperature=4", "divergence=reverse_kl", "divergence=jsd",
       "divergence=tv", "alpha=0.985 grad_clip=0", "examples=lines", "examples=lines count_padding")
metric = "modal_share"
against = "loss"
also = ("distinct_2", "repetition_4", "entropy", "to_unigram", "agreement")
