"""What people use instead of dray, and dray measured the same way: a producer's arrays to a consumer's arrays.

Each peer runs in two processes, in an environment that has what it needs; `environments` makes those that are not
there. Modules of peers import nothing of dray and of the harness but `benchmarks.service`, so that any environment
will do; NumPy is all they share.
"""
