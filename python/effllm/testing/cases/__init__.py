"""One module per op, each with its ``Case`` class and the lists ``CASES`` and ``BENCH``."""
