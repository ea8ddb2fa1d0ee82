"""What stands where a linear layer stood: plain factors, pivoted ones, stacks, per-head factors, each in floats or int8."""
