"""What tests and benchmarks of effllm share, usable by whoever adds ops or models.

``case`` the problem object, ``cases/<op>.py`` the problems of each op, ``compare`` the tolerance
law, ``hostile`` data and memory that expose wrong kernels, ``run`` the check of an op against a
case, ``timing`` timers and the limits of cards.
"""
