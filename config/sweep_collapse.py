# Question: what makes a distilled student write ",,,,", and what does not? (MEMORY 7.4's arms)
#   python sweep.py config/sweep_collapse.py     # after the commands of config/distill_teacher.py
# Base: the soft loss alone, KL at temperature 1, for 1,000 steps. Every loss has two budgets, and for each
# the best of three learning rates (by the loss of seed 1). KL with swapped arguments is reverse_kl. batchmean
# on (B, T, V) multiplies the soft loss by the tokens of a row: beside cross-entropy that is alpha=0.985
# (64:1); alone it does nothing, since Adam ignores the gradient's scale. Collapsed: modal_share above 0.5.
from config.sweep_distill import *

script = "distill"
without_teacher = "no"
alpha = 1.0
lr = 1e-2
_rates = {"": (1e-2, 1e-2), "alpha=0": (2e-2, 5e-3),  # after 100 and 1,000 steps
          "alpha=0.5 temperature=2": (1e-2, 1e-2), "temperature=4": (1e-2, 1e-2),
          "divergence=reverse_kl": (5e-3, 2.5e-3), "divergence=jsd": (1e-2, 1e-2),
          "divergence=tv": (1e-2, 1e-2), "alpha=0.985 grad_clip=0": (1e-2, 1e-2),
          "examples=lines": (2e-2, 2.5e-3), "examples=lines count_padding": (2e-2, 2.5e-3)}
arm = (*(f"{_loss} lr={_long}" for _loss, (_, _long) in _rates.items() if _loss),
       "examples=lines batch_size=44 lr=2.5e-3", "max_seq_len=12 batch_size=43",  # as many tokens, as short
       *(f"{_loss} lr={_short} max_steps=100".strip() for _loss, (_short, _) in _rates.items()))
metric = "modal_share"
against = "loss"
also = ("distinct_2", "repetition_4", "entropy", "to_unigram", "agreement")
