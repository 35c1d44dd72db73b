# Question: do learning rates that differ by entry, tensor or depth help, and what do they cost per step?
#   python optimizer_probe.py config/rates.py
#   python optimizer_probe.py config/steer_text.py --study=rates --name=rates_text
study = "rates"
optimizer = "adamw"
seeds = 6
steps = 200
