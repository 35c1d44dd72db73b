# Question: does a gradient steered before Adam still have the target cosine when it reaches the weights?
#   python optimizer_probe.py config/steer_adam.py
#   python optimizer_probe.py config/steer_adam.py --steer=update --name=steer_update
optimizer = "adamw"
steer = "grad"
seeds = 6
targets = 21
