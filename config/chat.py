# Question: does a base, any base, learn to answer?
#   python prepare_data.py chitchat --chat --tokenizer_from=data/chitchat
#   python train.py config/chat.py --init_from=out/chat_base
#   python sample.py out/chat --chat
# Only the answers count in the loss. The architecture and the context are those of init_from, which may be
# any checkpoint; chat tokens that are new to it start as the average token. An imported model keeps its own
# chat template and wants a lower rate: --lr=2e-5.
init_from = "out/chat_base"
data = "data/chitchat_chat"

batch_size = 16
epochs = 1
lr = 1e-3
schedule = "cosine"
warmup_steps = 20
min_lr_ratio = 0.0
weight_decay = 0.0
