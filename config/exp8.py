# Question: what does continued pre-training of a published model on clinical notes gain and forget?
# Changed: the weights of Qwen2.5-0.5B (494,032,768 parameters) instead of random ones; 30K notes.
# Documents: 1 epoch of 13M tokens, final loss 2.44.
#   python pretrained.py Qwen/Qwen2.5-0.5B --name=qwen
#   python prepare_data.py clinical --tokenizer_from=out/qwen  # or any text of yours
#   python train.py config/exp8.py
#   python train.py config/exp8.py --lora_rank=16 --lr=2e-4 --name=exp8_lora  # a small GPU
# Other text, standing for what it was trained on, shows what is forgotten, and is replayed:
#   python prepare_data.py wikitext2 --tokenizer_from=out/qwen --name=wiki_qwen
#   python train.py config/exp8.py --eval_data=data/wiki_qwen --name=exp8_old
#   python train.py config/exp8.py --replay=0.05 --replay_data=data/wiki_qwen --name=exp8_replay
init_from = "out/qwen"
data = "data/clinical"
max_seq_len = 512

batch_size = 16
epochs = 1
lr = 2e-5
warmup_steps = 100
weight_decay = 0.01
eval_interval = 500
prompts = ("The patient is a 58-year-old", "On examination,")
