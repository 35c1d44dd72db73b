# Question: how much of its old text does a model forget when it is trained further on new text?
#   python prepare_data.py shakespeare && python train.py config/demo.py
#   python prepare_data.py books --tokenizer_from=data/shakespeare --max_tokens=2e6 --max_eval_tokens=4e4
#   python train.py config/continual.py
#   python train.py config/continual.py --replay=0.05 --name=continual_replay
# Any folder of text will do for books; config/sweep_continual.py compares what helps. The architecture is
# that of out/demo. The rate is warmed up again to the peak of its training and decays again.
init_from = "out/demo"
data = "data/books"
eval_data = ("data/shakespeare",)
replay_data = "data/shakespeare"

batch_size = 16
epochs = 0
max_steps = 400
lr = 3e-3
warmup_steps = 20
min_lr_ratio = 0.0
eval_interval = 400
