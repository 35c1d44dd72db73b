# Question: which effects of the folklore vanish when they are measured cleanly?
#   python memory_probe.py config/probe_artefacts.py
#   python memory_probe.py config/probe_artefacts.py --artefacts=fresh_adam --name=fresh_adam
experiment = "artefacts"
seeds = 6
